"""Which weights a checkpoint's are: the averaged ones, the trained ones, or such that it does not tell."""

from pathlib import Path

import pytest
import torch
from checkpoints import GOLDEN, assert_same, ema_state, prefixed, raw_state, refused, run_folder

from elf_rt.export.checkpoint import load_checkpoint
from elf_rt.export.reference import ELF

ema = pytest.fixture(ema_state, scope="module")
raw = pytest.fixture(raw_state, scope="module")
run = pytest.fixture(run_folder)


def matrix(values):
    return next(value for value in values if value.ndim == 2)


TWO_SETS = {
    "timm": lambda r, e: {"arch": "elf", "epoch": 3, "state_dict": r, "state_dict_ema": e},
    "model and model_ema": lambda r, e: {"model": r, "model_ema": e, "optimizer": {"state": {}}},
    "k-diffusion": lambda r, e: {"model": prefixed(r, "inner_model."), "model_ema": prefixed(e, "inner_model.")},
    "official": lambda r, e: {"params": r, "ema_params1": e, "ema_params2": r, "step": 10},
    "ema_pytorch": lambda r, e: {
        "model": r,
        "ema": prefixed(r, "online_model.") | prefixed(e, "ema_model.") | {"initted": torch.tensor(True)},
    },
    "in one state dict": lambda r, e: {"state_dict": prefixed(r, "model.") | prefixed(e, "model_ema.")},
    "names without dots": lambda r, e: {
        "state_dict": prefixed(r, "model.")
        | {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in e.items()}
        | {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(3)}
    },
    "decays as keys": lambda r, e: {
        "model": {"net": r},
        "ema": {"0.9999": {"params": e}},
        "momentum": prefixed(r, "m."),
    },
    "averaged beside": lambda r, e: {"model": r, "swa": {"n_averaged": torch.tensor(4)} | prefixed(e, "module.")},
    "capital letters": lambda r, e: {"weights": r, "EMA": e},
    "non_ema": lambda r, e: {"model_non_ema": r, "model_ema": e},
    "without_ema": lambda r, e: {"ema": {"net_without_ema": r, "net": e}},
    "Polyak's": lambda r, e: {"params": r, "polyak_params": e},
}


@pytest.mark.parametrize("layout", TWO_SETS)
def test_two_sets_are_told_apart(run, raw, ema, layout):
    torch.save(TWO_SETS[layout](raw, ema), run / "model.pt")
    average = load_checkpoint(run / "model.pt")
    assert average.weights == "ema"
    assert_same(average.state, ema)
    if layout not in ("ema_pytorch", "decays as keys"):
        trained = load_checkpoint(run / "model.pt", raw=True)
        assert trained.weights == "raw"
        assert_same(trained.state, raw)


ONE_SET = {
    "training file": lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "epoch": 3},
    "compiled DDP": lambda s: prefixed(s, "_orig_mod.module."),
    "DDP around compiled": lambda s: {"net": prefixed(s, "module._orig_mod.")},
    "compiled blocks": lambda s: {
        name.replace("blocks.0.", "blocks.0._orig_mod._checkpoint_wrapped_module."): t for name, t in s.items()
    },
    "named for what it is not": lambda s: {"state_dict_no_ema": s},
    "inside a larger module": lambda s: prefixed(s, "denoiser.net.") | {"denoiser.sigma.weight": torch.zeros(2)},
}


@pytest.mark.parametrize("layout", ONE_SET)
def test_weights_without_a_name_are_unknown(run, raw, layout):
    torch.save(ONE_SET[layout](raw), run / "model.pt")
    checkpoint = load_checkpoint(run / "model.pt")
    assert checkpoint.weights == "unknown" and "unknown kind" in checkpoint.summary
    assert_same(checkpoint.state, raw)


def test_an_averaged_model_of_torch(run, ema):
    model = torch.nn.Module()
    model.elf = ELF(load_checkpoint(GOLDEN).config)
    model.elf.load_state_dict(ema)
    torch.save(torch.optim.swa_utils.AveragedModel(model).state_dict(), run / "model.pt")
    checkpoint = load_checkpoint(run / "model.pt")
    assert checkpoint.weights == "ema"
    assert_same(checkpoint.state, ema)


@pytest.mark.parametrize(
    ("keep", "where"),
    [
        (lambda values: {"ema": {"decay": 0.9, "shadow_params": values}}, "ema.shadow_params"),
        (lambda values: {"shadow_params": values}, "shadow_params"),
        (lambda values: {"callbacks": {"EMA": {"state": {"ema_weights": tuple(values)}}}}, "EMA.state.ema_weights"),
        (lambda values: {"ema": dict(enumerate(values))}, "ema.0"),
        (lambda values: {"optimizer_states": [{"opt": {}, "ema": tuple(values)}]}, "optimizer_states"),  # NeMo's
        (
            lambda values: {"optimizer": {"state": {0: {"exp_avg": matrix(values), "ema": matrix(values)}}}},
            "optimizer.state.0.ema",
        ),
        (lambda values: {"ema": {"blocks.0.attn.qkv.weight": matrix(values)}}, "ema.blocks.0"),
    ],
)
def test_an_average_without_names_is_not_passed_over(run, raw, ema, keep, where):
    torch.save({"model": raw, **keep(list(ema.values()))}, run / "model.pt")
    refused(run / "model.pt", "no EMA weights", where, "--raw")
    assert load_checkpoint(run / "model.pt", raw=True).weights == "raw"


def test_several_sets_are_refused_by_their_places(run, raw, ema):
    torch.save({"student": raw, "teacher": ema}, run / "model.pt")
    refused(run / "model.pt", "student, teacher", "save the state dict that you mean alone")


@pytest.mark.parametrize("average_of_gradients", ["exp_avg", "square_avg", "max_exp_avg_sq"])
def test_averages_of_gradients_are_no_weights(run, ema, average_of_gradients):
    torch.save({"model": ema, "optimizer": {"state": {0: {average_of_gradients: torch.ones(3)}}}}, run / "model.pt")
    assert load_checkpoint(run / "model.pt").weights == "unknown"


@pytest.mark.parametrize(
    ("trained", "averaged"),
    [
        ("last.ckpt", "last-EMA.ckpt"),  # NeMo's
        ("step=10.ckpt", "step=10-EMA.ckpt"),
        ("checkpoint_10", "checkpoint_10_ema"),
        ("latest.pt", "ema_latest.pt"),
        ("checkpoints/model.pt", "ema/model.pt"),
    ],
)
def test_averaged_weights_in_a_file_of_their_own_are_not_passed_over(run, raw, ema, trained, averaged):
    for name, state in ((trained, raw), (averaged, ema)):
        (run / name).parent.mkdir(exist_ok=True)
        torch.save({"state_dict": state}, run / name)
    refused(run, "averaged weights (EMA)", Path(averaged).parts[0], "name the one to export")
    assert_same(load_checkpoint(run / averaged).state, ema)
    assert_same(load_checkpoint(run / trained).state, raw)


@pytest.mark.parametrize(
    "beside", ["epoch=3-avg_val_loss=0.31.ckpt", "val_loss_avg=0.12.ckpt", "samples_ema/0001/a.png"]
)
def test_measures_and_samples_are_no_averaged_weights(run, raw, beside):
    for name in ("last.ckpt", beside):
        (run / name).parent.mkdir(exist_ok=True, parents=True)
        torch.save({"state_dict": raw, "loss_avg": torch.ones(9), "loss_ema": [torch.ones(3)]}, run / name)
    assert load_checkpoint(run).weights == "unknown"
