"""`ModelConfig` from a checkpoint: sizes of its tensors, numbers of its YAML or file, and every bad setting."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from elf_rt.errors import CheckpointError
from elf_rt.export.checkpoint import load_checkpoint
from elf_rt.export.config import expected_shapes, make_config, read_sizes
from elf_rt.export.settings import Settings
from elf_rt.params import RELEASED

GOLDEN = Path(__file__).parent / "data" / "golden"
OFFICIAL = GOLDEN / "uncond" / "checkpoint_10"
CONFIG = GOLDEN / "uncond" / "config.yml"


@pytest.fixture
def ema():
    """The golden checkpoint's weights, as torch alone reads them."""
    return torch.load(OFFICIAL, weights_only=True)["ema_params1"]


def test_sizes_and_settings():
    checkpoint = load_checkpoint(GOLDEN / "cond")
    expected = {
        "depth": 2,
        "hidden_size": 48,
        "num_heads": 4,
        "head_dim": 12,
        "mlp_dim": 128,
        "latent_dim": 32,
        "bottleneck_dim": 8,
        "vocab_size": 97,
        "num_time_tokens": 4,
        "num_self_cond_cfg_tokens": 4,
        "num_model_mode_tokens": 4,
        "self_cond": True,
        "decoder_head_norm": False,
        "head_gelu": "tanh",
        "max_length": 24,
        "max_input_length": 10,
        "noise_scale": 2.0,
        "t_eps": 0.05,
        "p_mean": -1.5,
        "p_std": 0.8,
        "latent_mean": 0.0,
        "latent_std": 0.2,
    }
    assert dataclasses.asdict(checkpoint.config) == expected
    assert checkpoint.settings == yaml.safe_load((GOLDEN / "cond" / "config.yml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", ["cond", "head_dim_66", "no_sc_tokens", "no_self_cond", "t5", "uncond"])
def test_golden_cases_load_as_their_config_says(case):
    config, settings = (
        load_checkpoint(GOLDEN / case).config,
        yaml.safe_load((GOLDEN / case / "config.yml").read_text(encoding="utf-8")),
    )
    names = ("bottleneck_dim", "num_time_tokens", "num_self_cond_cfg_tokens", "num_model_mode_tokens", "latent_mean")
    assert [getattr(config, name) for name in names] == [settings[name] for name in names]
    assert config.self_cond == (settings["self_cond_prob"] > 0)
    assert config.head_dim == (66 if case == "head_dim_66" else 12)


def test_unused_self_conditioning_is_left_out():
    stored = torch.load(GOLDEN / "no_self_cond" / "checkpoint_10", weights_only=True)["ema_params1"]
    state = load_checkpoint(GOLDEN / "no_self_cond").state
    assert stored.keys() - state.keys() == {"self_cond_proj.weight", "self_cond_proj.bias"}


def test_self_conditioning_needs_its_tensors(tmp_path, ema):
    torch.save({name: tensor for name, tensor in ema.items() if "self_cond_proj" not in name}, tmp_path / "model.pt")
    settings = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    (tmp_path / "config.yml").write_text(yaml.safe_dump(settings))
    with pytest.raises(CheckpointError, match="self_cond_prob above 0, but the weights hold no self_cond_proj"):
        load_checkpoint(tmp_path)
    del settings["self_cond_prob"]
    (tmp_path / "config.yml").write_text(yaml.safe_dump(settings))
    assert not load_checkpoint(tmp_path).config.self_cond


def test_settings_inside_the_file_or_named(tmp_path, ema):
    inside = {"max_length": 20, "latent_mean": "1e-1", "denoiser_noise_scale": 1}
    path = tmp_path / "model.pt"
    torch.save({"config": inside, "ema": ema}, path)
    config = load_checkpoint(path).config
    assert (config.max_length, config.latent_mean, config.noise_scale) == (20, 0.1, 1.0)
    assert (config.p_mean, config.p_std, config.t_eps, config.latent_std) == (-1.5, 0.8, 0.05, 0.2)
    assert load_checkpoint(path, config=CONFIG).config.max_length == 16
    (tmp_path / "train.yaml").write_text("max_length: 18")
    assert load_checkpoint(path).config.max_length == 18
    (tmp_path / "other.yml").write_text("max_length: 19")
    with pytest.raises(CheckpointError, match=r"several YAML files \(other.yml, train.yaml\)"):
        load_checkpoint(path)


def test_released_sizes_need_no_yaml(tmp_path):
    released = dataclasses.asdict(RELEASED["ELF-B"])
    state = {name: torch.zeros(1).expand(shape) for name, shape in expected_shapes(released).items()}
    with pytest.warns(UserWarning, match="taken for ELF-B: unconditional, 1024 tokens"):
        assert make_config(read_sizes(state), Settings({}, tmp_path)) == RELEASED["ELF-B"]
    with pytest.raises(CheckpointError, match=r"no released size .*--config"):
        make_config(read_sizes(state) | {"depth": 11}, Settings({}, tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must hold a YAML mapping .*got a list"),
        ("", "must hold a YAML mapping .*got a NoneType"),
        ("a: [1\nb: 2", "is not YAML"),
        ("t_eps: 0.05\n", "lacks max_length"),
        ("max_length: 0\n", "max_length must be a whole number from 1 to 65536, got 0"),
        ("max_length: 16.5\n", "max_length must be a whole number"),
        ("max_length: true\n", "max_length must be a whole number"),
        ("{max_length: 16, max_input_length: 16}", "max_input_length 16 must be below max_length 16"),
        ("{max_length: 16, latent_std: 0}", "latent_std must be a number from 1e-09 to 1e.06, got 0"),
        ("{max_length: 16, denoiser_p_mean: .nan}", "denoiser_p_mean must be a number from -100 to 100, got nan"),
        ("{max_length: 16, t_eps: small}", "t_eps must be a number from 1e-12 to 1, got 'small'"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    shutil.copy(OFFICIAL, tmp_path)
    (tmp_path / "config.yml").write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_yaml_that_is_not_there(tmp_path, ema):
    with pytest.raises(CheckpointError, match=r"absent.yml cannot be read"):
        load_checkpoint(OFFICIAL, config=tmp_path / "absent.yml")
    path = tmp_path / "model.pt"
    torch.save(ema, path)
    with pytest.raises(CheckpointError, match=r"no released size \(ELF-B, ELF-M, ELF-L\): .*--config"):
        load_checkpoint(path)


def test_the_config_of_other_weights_is_refused(tmp_path):
    other = yaml.safe_load((GOLDEN / "cond" / "config.yml").read_text(encoding="utf-8")) | {"bottleneck_dim": 48}
    (tmp_path / "other.yml").write_text(yaml.safe_dump(other))
    with pytest.raises(
        CheckpointError, match="not the config of these weights: it says bottleneck_dim 48, they have 8"
    ):
        load_checkpoint(GOLDEN / "cond", config=tmp_path / "other.yml")


def test_values_that_a_config_lacks_are_told(tmp_path):
    (tmp_path / "short.yml").write_text("max_length: 24\nt_eps: 0.05\n")
    with pytest.warns(UserWarning, match="lacks denoiser_noise_scale, denoiser_p_mean, .* ELF-B's values are taken"):
        load_checkpoint(GOLDEN / "cond", config=tmp_path / "short.yml")
