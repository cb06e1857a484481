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
from elf_rt.export.settings import Settings, find_settings
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
    assert checkpoint.settings.values == yaml.safe_load((GOLDEN / "cond" / "config.yml").read_text(encoding="utf-8"))


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
        ("", "is empty: copy or download it again"),
        ("# nothing\n", "must hold a YAML mapping .*got a NoneType"),
        ("a: [1\nb: 2", "is not YAML"),
        ("t_eps: 0.05\n", "lacks max_length"),
        ("max_length: 0\n", "max_length must be a whole number from 1 to 65536, got 0"),
        ("max_length: 16.5\n", "max_length must be a whole number"),
        ("max_length: true\n", "max_length must be a whole number"),
        ("{max_length: 16, max_input_length: 16}", "max_input_length 16 must be below max_length 16"),
        ("{max_length: 16, latent_std: 0}", "latent_std must be a number from 1e-09 to 1e.06, got 0"),
        ("{max_length: 16, denoiser_p_mean: .nan}", "denoiser_p_mean must be a number from -100 to 100, got nan"),
        ("{max_length: 16, t_eps: small}", "t_eps must be a number from 1e-09 to 1, got 'small'"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    refusal_of_yaml(tmp_path, text, message)


def refusal_of_yaml(folder, text, message):
    """The one line, which matches the message, that a checkpoint beside this YAML is refused with."""
    shutil.copy(OFFICIAL, folder)
    (folder / "config.yml").write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_yaml_that_is_not_there(tmp_path, ema):
    with pytest.raises(CheckpointError, match=r"absent.yml is missing"):
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


def settings(text, tmp_path):
    (tmp_path / "config.yml").write_text(text)
    return find_settings([tmp_path], [], Settings({}, tmp_path), None)


def test_interpolations_and_sections(tmp_path):
    """OmegaConf's `${section.key}`, and keys where Hydra users put them."""
    text = "max_length: ${data.length}\ndata: {length: '${sizes.all}'}\nsizes: {all: 24}\nmodel: {latent_std: 2e-1}\n"
    found = settings(text, tmp_path)
    assert found.integer("max_length", 1, 100) == 24
    assert found.number("latent_std", 0, 1) == 0.2
    for value in ("${oc.env:HOME}", "${a.b}", "${a}", "???", "x${data.length}"):
        bad = settings(f"max_length: 3\na: ${{a}}\nt_eps: {value!r}\n", tmp_path)
        with pytest.raises(CheckpointError, match=r"t_eps is .*write its value"):
            bad.number("t_eps", 0, 1)
    with pytest.raises(CheckpointError, match="several sections"):
        settings("max_length: 3\nmodel: {t_eps: 1}\ndata: {t_eps: 2}\n", tmp_path).get("t_eps")


@pytest.mark.parametrize("value", [10**9, 10**20, -1, "1e3x", "9" * 400, 65537, [16], {"a": 1}, "1_6", float("inf")])
def test_lengths_have_a_range(tmp_path, value):
    shutil.copy(OFFICIAL, tmp_path)
    (tmp_path / "config.yml").write_text(yaml.safe_dump({"max_length": value}))
    with pytest.raises(CheckpointError, match="max_length must be a whole number from 1 to 65536") as caught:
        load_checkpoint(tmp_path)
    assert len(str(caught.value)) < 400


def test_numbers_that_yaml_reads_as_text(tmp_path):
    shutil.copy(OFFICIAL, tmp_path)
    (tmp_path / "config.yml").write_text(CONFIG.read_text() + "\nmax_length: '16'\nt_eps: 5e-2\nstarted: 2024-02-30\n")
    assert load_checkpoint(tmp_path).config == load_checkpoint(GOLDEN / "uncond").config


@pytest.mark.parametrize(
    "text",
    [
        "max_length: 16\na0: &a0 [1, 1]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(60)),
        "max_length: 16\nx: !!python/object/apply:os.system ['false']\ny: !!python/tuple [1]\n",
        "max_length: 16\nx: &x [*x]\n",
    ],
)
def test_yaml_that_would_grow_or_run(tmp_path, text):
    shutil.copy(OFFICIAL, tmp_path)
    (tmp_path / "config.yml").write_text(text)
    assert load_checkpoint(tmp_path).config.max_length == 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_length: 16\nx: " + "[" * 20_000, "nested too deep"),
        ("max_length: 16\nx: &x 1\ny: [" + "*x, " * 2000 + "]", "more than 1000 aliases"),
        ("max_length: " + "9" * 6000, "4300 digits"),
        ("version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("<html></html>", "web page"),
        ("x: [" + "1," * 100_000 + "]", "longer than 128 kB"),
        ("max_length: 16\nx: !!bool perhaps\n", "is not YAML"),
    ],
)
def test_yaml_that_costs_too_much(tmp_path, text, message):
    assert len(refusal_of_yaml(tmp_path, text, message)) < 500


def test_active_depth(tmp_path):
    """Only the first blocks run."""
    shutil.copy(OFFICIAL, tmp_path)
    (tmp_path / "config.yml").write_text(CONFIG.read_text() + "\nactive_depth: 1\ndepth: 2\n")
    with pytest.warns(UserWarning, match="active_depth 1: blocks 1 to 1 are left out"):
        checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.config.depth == 1 and not any(name.startswith("blocks.1.") for name in checkpoint.state)
    (tmp_path / "config.yml").write_text(CONFIG.read_text() + "\nactive_depth: 3\n")
    with pytest.raises(CheckpointError, match="active_depth must be a whole number from 1 to 2, got 3"):
        load_checkpoint(tmp_path)


def test_a_conditional_model_that_was_padded_with_pad(tmp_path):
    shutil.copy(GOLDEN / "cond" / "checkpoint_10", tmp_path)
    text = (GOLDEN / "cond" / "config.yml").read_text()
    (tmp_path / "config.yml").write_text(text.replace("pad_token: eos", "pad_token: pad"))
    with pytest.warns(UserWarning, match="never learns to end its texts"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("names", [["unembed_bias", "unembed_kernel"], ["text_proj.proj1.weight"]])
def test_sizes_of_zero(tmp_path, ema, names):
    empty = {
        name: tensor[..., :0] if "unembed" in name else tensor[:0] for name, tensor in ema.items() if name in names
    }
    torch.save(ema | {name: tensor.clone() for name, tensor in empty.items()}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="mis-shaped"):
        load_checkpoint(tmp_path / "model.pt", config=CONFIG)


def test_a_block_of_5000_digits(tmp_path, ema):
    torch.save(ema | {f"blocks.{'9' * 5000}.norm1.weight": torch.ones(48)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"unexpected|nested without end") as caught:
        load_checkpoint(tmp_path / "model.pt", config=CONFIG)
    assert len(str(caught.value)) < 700
