"""Public families of ELF, as small random checkpoints of exactly their layout, against ELF in numpy and float64."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import export
from numpy_elf import NumpyElf
from onnx_run import Reference, random_call, written
from plan_bundles import model_bundle
from torch_on_cpu import CpuTorch, call_on

from elf_rt.backends.ort import OrtBackend
from elf_rt.bundle import Bundle
from elf_rt.errors import CheckpointError
from elf_rt.export.checkpoint import load_checkpoint
from elf_rt.export.families import family_of
from elf_rt.export.graph import LOGITS_AT_ONCE
from elf_rt.export.precision import Precision, PrecisionPlan
from elf_rt.export.presets import FAMILY_PRESETS
from elf_rt.export.random_init import random_state
from elf_rt.export.reference import ELF
from elf_rt.measure.verify import verify, verify_folder
from elf_rt.model import Model, load
from elf_rt.params import ModelConfig

INPUTS = "z", "x_prev", "t", "s", "mode"
SIZES = ModelConfig(
    depth=1,
    hidden_size=48,
    num_heads=4,
    head_dim=12,
    mlp_dim=128,
    latent_dim=20,
    bottleneck_dim=8,
    vocab_size=301,
    max_length=14,
)
T5GEMMA = {  # what its train.py keeps beside the weights
    "model": "ELF-B",
    "encoder": "google/t5gemma-2-270m-270m",
    "tokenizer": "la0ka1/T5Gemma-2-270M-OWTdistilled",
    "dim": 20,
    "seq_len": 14,
    "vocab_size": 301,
    "mean": 0.013,
    "std": 0.71,
}
MMD = {  # what ELF-MMD's YAML says of an unconditional student
    "objective": "mmd",
    "task": "owt",
    "max_length": 14,
    "pad_token": "pad",
    "encoder_family": "t5",
    "encoder_model_name": "t5-small",
    "latent_mean": 0.0,
    "latent_std": 0.2,
    "model": "ELF-B",
    "sampling_configs_path": "src/configs/sampling_configs/elf-mmd_owt.yml",
    "denoiser_noise_scale": 2.0,
    "denoiser_p_mean": 0.8,
    "denoiser_p_std": 0.8,
    "t_eps": 0.05,
}


def t5gemma_checkpoint(folder: Path) -> tuple[Path, NumpyElf]:
    state = random_state(SIZES, 0)
    state["final_layer.norm.weight"] = state.pop("final_layer.norm_final.weight")
    state["proj_kernel"] *= 3  # so that both ends of the GELU are met
    torch.save({"config": T5GEMMA, "ema": state}, folder / "ELF-B-T5Gemma2.pt")
    return folder / "ELF-B-T5Gemma2.pt", NumpyElf(state, exact_gelu=True, final_norm="final_layer.norm")


def mmd_checkpoint(folder: Path, **settings: object) -> tuple[Path, NumpyElf]:
    """The folder that its authors publish: EMA weights alone, a YAML, here with a normed head."""
    state = random_state(dataclasses.replace(SIZES, decoder_head_norm=True), 1)
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "ckpt.pt")
    (folder / "eval_config.yml").write_text(yaml.safe_dump(MMD | {"decoder_head_norm": True} | settings))
    return folder, NumpyElf(state)


def replay(path: Path, network: NumpyElf, spec: str, run: dict[str, np.ndarray], latents: np.ndarray, s: float) -> Path:
    """A replay file of one run, and of one call with a previous estimate."""
    z, x_prev, t = run["z0"], run["z0"][::-1] / 3, np.array([0.3, 0.8])
    arrays = {f"run0_{name}": np.asarray(value, np.float32) for name, value in run.items()}
    arrays |= {
        "run0_spec": np.array(spec),
        "run0_latent": latents,
        "run0_ids": np.stack([network.ids(row, s) for row in latents]),
        "fwd_z": np.float32(z),
        "fwd_x_prev": np.float32(x_prev),
        "fwd_t": np.float32(t),
        "fwd_sc": np.full(2, s, np.float32),
        "fwd_x": np.stack([network.call(z[i], x_prev[i], t[i], s)[0] for i in range(2)]),
        "dec_ids": np.stack([network.ids(z[i], s) for i in range(2)]),
    }
    np.savez(path, **arrays)
    return path


def drawn(steps: int) -> tuple[np.random.Generator, np.ndarray, np.ndarray]:
    """Start (2, L, C) and noise (steps, 2, L, C), exact in float32."""
    random = np.random.default_rng(3)
    shape = (2, SIZES.max_length, SIZES.latent_dim)
    return random, np.float32(2 * random.normal(size=shape)), np.float32(random.normal(size=(steps, *shape)))


def verify_everywhere(bundle: Path, file: Path) -> None:
    for backend in ("onnxruntime", "openvino"):
        report = verify_folder(bundle, file, backend=backend, precision="fp32")
        assert report.passed, report
    opened = Bundle.open(bundle)
    with Model(opened, lambda _: (CpuTorch(opened, "fp32"), "test")) as model:
        report = verify(model, file)
    assert report.passed, report


@pytest.mark.filterwarnings("ignore:no tokenizer")
def test_t5gemma_on_every_backend(tmp_path):
    path, network = t5gemma_checkpoint(tmp_path)
    bundle = export(path, tmp_path / "model.elfrt")
    random, z, eps = drawn(6)
    grid = np.float32(np.r_[0.0, np.sort(random.uniform(size=5)), 1.0])
    latents = np.stack(
        [network.sde(z[i], np.float64(grid), eps[:, i], 1.0, noise_scale=2.0, gamma=1.5) for i in range(2)]
    )
    run = {"z0": z, "t": grid, "eps": eps[:5]}
    spec = "method: sde\nsteps: 6\nschedule: logit_normal\ngamma: 1.5\nsc: 1.0\n"
    verify_everywhere(bundle, replay(tmp_path / "replay.npz", network, spec, run, latents, 1.0))
    opened = Bundle.open(bundle)
    assert (opened.config.head_gelu, opened.config.latent_mean, opened.config.latent_std) == ("none", 0.013, 0.71)
    assert opened.presets == FAMILY_PRESETS["ELF-B-T5Gemma2"]


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> tuple[Path, NumpyElf]:
    """The bundle of a normed student, and its network."""
    folder = tmp_path_factory.mktemp("student")
    source, network = mmd_checkpoint(folder / "elf-mmd", encoder_model_name=None)
    return export(source, folder / "model.elfrt"), network


@pytest.mark.parametrize("renew", [False, True])
def test_mmd_students_on_every_backend(tmp_path, student, renew):
    bundle, network = student
    _, z, eps = drawn(4)
    latents = np.stack([network.refine(z[i], eps[:, i], 4, 3.0, noise_scale=2.0, renew=renew) for i in range(2)])
    run = {"z0": z, "t": np.r_[0.0, 0.0, 0.0, 0.0, 1.0], "eps": eps if renew else eps[:0]}
    spec = f"method: refine\nsteps: 4\nschedule: uniform\ngamma: {float(renew)}\nsc: 3.0\n"
    verify_everywhere(bundle, replay(tmp_path / "replay.npz", network, spec, run, latents, 3.0))
    opened = Bundle.open(bundle)
    assert opened.config.decoder_head_norm
    assert opened.config.head_gelu == "tanh"
    assert opened.presets == FAMILY_PRESETS["ELF-MMD"]


@pytest.fixture(scope="module")
def conditional(tmp_path_factory) -> tuple[Path, NumpyElf, Any, dict[str, torch.Tensor]]:
    """The bundle of a conditional student on GPT-2, as for GSM8K; its network, its GPT-2, its latents' statistics."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2Model

    folder = tmp_path_factory.mktemp("conditional")
    settings = {"encoder_family": "gpt2", "encoder_model_name": "gpt2", "pad_token": "eos", "max_input_length": 6}
    source, network = mmd_checkpoint(folder / "elf-mmd", **settings, latent_mean="latent_stats.pt")
    statistics = {name: torch.rand(20) + 0.5 for name in ("mean", "std", "mean_pos0", "std_pos0")}
    torch.save(statistics, source / "latent_stats.pt")
    torch.manual_seed(0)
    gpt2 = GPT2Model(GPT2Config(vocab_size=257, n_embd=20, n_layer=2, n_head=2, initializer_range=0.3)).eval()
    gpt2.save_pretrained(source / "gpt2")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(source / "gpt2" / "tokenizer.json"))
    return export(source, folder / "model.elfrt", append_eos=None), network, gpt2, statistics


def test_conditional_mmd_students_on_every_backend(tmp_path, conditional):
    bundle, network, _, _ = conditional
    random, z, eps = drawn(4)
    cond, held = np.float32(random.normal(size=z.shape)), [6, 2]
    latents = np.stack(
        [
            network.refine(z[i], eps[:, i], 4, 1.0, noise_scale=2.0, renew=True, source=cond[i], held=held[i])
            for i in range(2)
        ]
    )
    mask = np.arange(SIZES.max_length) < np.array(held)[:, None]
    run = {"z0": z, "t": np.r_[0.0, 0.0, 0.0, 0.0, 1.0], "eps": eps, "cond": cond, "cond_mask": mask}
    spec = "method: refine\nsteps: 4\nschedule: uniform\ngamma: 1.0\nsc: 1.0\n"
    verify_everywhere(bundle, replay(tmp_path / "replay.npz", network, spec, run, latents, 1.0))
    assert Bundle.open(bundle).presets == FAMILY_PRESETS["ELF-MMD conditional"]


def test_gpt2_sources_are_normalised_by_channel_and_have_no_eos(conditional):
    bundle, _, gpt2, statistics = conditional
    with load(bundle, "onnxruntime") as model:
        sources = model.codec.tokenize(["2+2=", "a"])
        latents, mask = model.codec.encode(sources, 14)
    assert [len(ids) for ids in sources] == [4, 1]
    for ids, row, held in zip(sources, latents, mask, strict=True):
        with torch.no_grad():
            want = gpt2(torch.tensor([ids])).last_hidden_state[0]
        want[1:] = (want[1:] - statistics["mean"]) / statistics["std"]
        want[0] = (want[0] - statistics["mean_pos0"]) / statistics["std_pos0"]
        np.testing.assert_allclose(row[held], want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:no tokenizer")
def test_only_texts_of_unconditional_gpt2_models_go_on_behind_eos(tmp_path, conditional):
    source, _ = mmd_checkpoint(tmp_path / "elf-mmd", encoder_family="gpt2", encoder_model_name=None, pad_token="eos")
    for bundle, goes_on in ((export(source, tmp_path / "model.elfrt", append_eos=None), True), (conditional[0], False)):
        with load(bundle, "onnxruntime") as model:
            eos, pad = model.codec.eos_id, model.codec.pad_id
            ids = np.array([[eos, 7, 8, eos, 9]])
            want = ids if goes_on else np.full_like(ids, pad)
            np.testing.assert_array_equal(model.codec.finish(ids, None), want)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "latent_mean is neither a number nor a file here: latent_stats.pt"),
        ({"mean": torch.zeros(20)}, "must hold mean, std, tensors of 20 channels each"),
        ({"mean": torch.zeros(19), "std": torch.ones(19)}, "must hold mean, std, tensors of 20 channels each"),
        ({"mean": torch.zeros(20), "std": torch.zeros(20)}, "every deviation must be above 0"),
        (
            {"mean": torch.zeros(20), "std": torch.ones(20), "mean_pos0": torch.zeros(20)},
            "must hold mean_pos0, mean, std_pos0, std",
        ),
    ],
)
def test_bad_statistics(tmp_path, content, message):
    source, _ = mmd_checkpoint(tmp_path / "elf-mmd", latent_mean="latent_stats.pt")
    if content is not None:
        torch.save(content, source / "latent_stats.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(source)


def test_statistics_on_the_hub(tmp_path, monkeypatch):
    """latent_mean may be org/name/path, of the teacher's repository."""
    source, _ = mmd_checkpoint(tmp_path / "elf-mmd", latent_mean="hf://some/Model/ELF-B/elf/latent_stats.pt")
    asked = []

    def download(repo, patterns):
        asked.append((repo, patterns))
        return tmp_path / "hub"

    monkeypatch.setattr("elf_rt.export.families.download", download)
    with pytest.raises(CheckpointError, match=r"the Hub model some/Model has no ELF-B/elf/latent_stats\.pt"):
        load_checkpoint(source)
    (tmp_path / "hub" / "ELF-B" / "elf").mkdir(parents=True)
    torch.save({"mean": torch.arange(20.0), "std": torch.ones(20)}, tmp_path / "hub/ELF-B/elf/latent_stats.pt")
    checkpoint = load_checkpoint(source)
    np.testing.assert_array_equal(checkpoint.statistics, [[np.arange(20)], [np.ones(20)]])
    assert (checkpoint.config.latent_mean, checkpoint.config.latent_std) == (0.0, 1.0)
    assert asked == 2 * [("some/Model", ["ELF-B/elf/latent_stats.pt"])]


@pytest.mark.parametrize("head_gelu", ["tanh", "none"])
def test_the_gelu_of_the_head_decides(tmp_path, head_gelu):
    """At -2.7 the two kinds differ most, by 4.7e-4. Token 8 wins where the feature is above the middle of both."""
    config = dataclasses.replace(SIZES, head_gelu=head_gelu)
    state = random_state(config, 0)
    for name in ("proj_kernel", "unembed_kernel", "unembed_bias"):
        state[name].zero_()
    state["proj_bias"][:] = -2.7
    at = torch.tensor(-2.7, dtype=torch.float64)
    kinds = {kind: float(torch.nn.functional.gelu(at, approximate=kind)) for kind in ("tanh", "none")}
    state["unembed_kernel"][0, 8] = 1000
    state["unembed_bias"][:] = 1000 * sum(kinds.values()) / 2
    state["unembed_bias"][8] = 0
    want = 8 if kinds[head_gelu] == max(kinds.values()) else 0
    bundle = model_bundle(tmp_path / "model.elfrt", config, state, ("fp32",))
    for backend in (OrtBackend(bundle, "fp32", 1), CpuTorch(bundle, "fp32")):
        _, ids = call_on(backend, 1, 3, lambda denoiser: [denoiser.arrays[name].fill(1.0) for name in INPUTS])
        assert (ids == want).all()


def test_the_lightning_reproduction_has_the_exact_gelu(tmp_path):
    """It names the last norm as the T5Gemma-2 models do, which are derived from it."""
    state = random_state(SIZES, 2)
    state["final_layer.norm.weight"] = state.pop("final_layer.norm_final.weight")
    ema = {name: tensor + 1 for name, tensor in state.items()}
    trained = {f"model.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": trained, "ema": {"shadow": ema}, "global_step": 5}, tmp_path / "last.ckpt")
    (tmp_path / "config.yml").write_text(yaml.safe_dump(MMD | {"objective": None, "sampling_configs_path": None}))
    checkpoint = load_checkpoint(tmp_path)
    assert (checkpoint.config.head_gelu, family_of(checkpoint.settings.values)) == ("none", "")
    assert torch.equal(checkpoint.state["final_layer.norm_final.weight"], ema["final_layer.norm.weight"])


def test_raw_weights_of_a_t5gemma_run(tmp_path):
    path, _ = t5gemma_checkpoint(tmp_path)
    content = torch.load(path)
    raw = {name: tensor + 1 for name, tensor in content["ema"].items()}
    torch.save(content | {"step": 9, "model": raw, "optimizers": []}, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its settings lack nothing
        state = load_checkpoint(path, raw=True).state
    assert torch.equal(state["final_layer.norm_final.weight"], raw["final_layer.norm.weight"])


def test_the_norm_that_a_config_names_must_be_there(tmp_path):
    source, _ = mmd_checkpoint(tmp_path / "elf-mmd")
    torch.save(random_state(SIZES, 1), source / "ckpt.pt")
    with pytest.raises(CheckpointError, match="it says decoder_head_norm True, they have False"):
        load_checkpoint(source)


@pytest.mark.parametrize(
    ("settings", "family"),
    [
        ({"objective": "ird"}, "ELF-MMD"),
        ({"objective": "mmd", "max_input_length": 256}, "ELF-MMD conditional"),
        ({"sampling_configs": [{"sampling_method": "iterative_refinement"}]}, "ELF-MMD"),
        ({"task": "tinygsm", "objective": "mmd", "max_input_length": 256}, "ELF-MMD conditional"),
        ({"task": "tinygsm", "max_input_length": 256}, "ELF on TinyGSM"),
        ({"sampling_configs": [{"sampling_method": "sde"}]}, ""),
        ({"sampling_configs_path": "src/configs/sampling_configs/elf_owt.yml"}, ""),
        ({"seq_len": 1024, "model": "ELF-M", "encoder": "T5Gemma-2-270M-OWTdistilled"}, "ELF-M-T5Gemma2distilled"),
        ({"seq_len": 1024, "model": "ELF-M", "encoder": "google-t5/t5-small"}, ""),
    ],
)
def test_which_presets_settings_ask_for(settings, family):
    assert family_of(settings) == family
    assert not family or family in FAMILY_PRESETS


@pytest.mark.parametrize(("precision", "opset"), [(Precision.FP32, 20), (Precision.FP16, 23), (Precision.BF16, 20)])
def test_the_head_in_other_graphs(tmp_path, precision, opset):
    """A normed head with the exact GELU, in 16 bits and without fused norms: the tokens of the float32 reference."""
    config = dataclasses.replace(SIZES, decoder_head_norm=True, head_gelu="none")
    state = random_state(config, 4)
    state["unembed_kernel"] *= 4
    model = ELF(config)
    model.load_state_dict(state)
    graphs = written(tmp_path, config, state, PrecisionPlan(precision), opset)
    call = random_call(config, 20, 14, seed=5, mode=1.0)
    least = 1.0 if precision is Precision.FP32 else 0.97  # untrained logits are near ties
    assert np.mean(graphs.decode(call) == Reference(model).decode(call)) >= least
    with torch.no_grad():
        model.decoder_head_norm.weight[:] = 1.0  # the norm's weight is of use
    assert np.mean(graphs.decode(call) == Reference(model).decode(call)) < 0.97


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_large_vocabulary_goes_by_parts(tmp_path, precision):
    """Ids of all parts and the lowest on a tie, also of two parts, as from the whole product."""
    config = dataclasses.replace(SIZES, vocab_size=2 * LOGITS_AT_ONCE + 41)
    state = random_state(config, 6)
    model = ELF(config)
    model.load_state_dict(state)
    bundle = model_bundle(tmp_path / "model.elfrt", config, state, ("fp32", "fp16"))
    call = random_call(config, 4, 14, seed=7, mode=1.0)

    def write(denoiser):
        for name, value in zip(INPUTS, call, strict=True):
            denoiser.arrays[name][:] = value

    want = Reference(model).decode(call)
    assert set((want // LOGITS_AT_ONCE).flat) == {0, 1}
    rival = int(want.flat[np.argmax(want.flat)])  # its twin in the first part must win
    twins = state | {name: state[name].clone() for name in ("unembed_kernel", "unembed_bias")}
    twins["unembed_kernel"][:, 5], twins["unembed_bias"][5] = (
        state["unembed_kernel"][:, rival],
        state["unembed_bias"][rival],
    )
    tied = model_bundle(tmp_path / "tied.elfrt", config, twins, ("fp32", "fp16"))
    for opened, ids in ((bundle, want), (tied, np.where(want == rival, 5, want))):
        for backend in (OrtBackend(opened, precision, 1), CpuTorch(opened, precision)):
            _, got = call_on(backend, 4, 14, write)
            assert np.mean(got == ids) >= (1.0 if precision == "fp32" else 0.9)
