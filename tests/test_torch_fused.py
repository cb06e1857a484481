"""The Triton kernels under a precision plan: powers of two that were folded into the graphs are honoured."""

from pathlib import Path

import pytest
import torch
from conftest import HAS_GPU
from golden_cases import golden, relative_error
from plan_bundles import model_bundle

from elf_rt.backends import torch_tuning
from elf_rt.backends.torch_attention import TORCH
from elf_rt.backends.torch_network import Choice, Network
from elf_rt.backends.torch_tuning import KERNELS, Call, Tuner, make_fused, tiles_of
from elf_rt.bundle import Bundle
from elf_rt.export.graph import variant_files, write_graphs
from elf_rt.export.precision import Item, Precision, PrecisionPlan

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(HAS_GPU, reason="the kernels are compiled here, so no interpreter runs them on the CPU")


def fused_call(bundle: Bundle) -> torch.Tensor:
    """x of a call by the kernels, on the same random numbers each time."""
    network = Network(bundle, "fp16", "cpu")
    fused = make_fused(network, 90)
    assert not isinstance(fused, str)
    network.fused = fused
    tiles = {product: possible[0] for product, possible in tiles_of(fused, 90).items()}
    torch.manual_seed(1)
    call = Call(network, 2, 9)
    with torch.inference_mode():
        call.run(Choice(TORCH, tiles))
    return call.x


def test_folded_powers_of_two(tmp_path: Path) -> None:
    """Scales of one, of all and of single channels; q and k with norms whose eps moved with them."""
    data = golden("uncond")
    bundle = model_bundle(tmp_path / "a.elfrt", data.config, data.state, ("fp16",))
    plain = fused_call(bundle)
    items = (
        Item("blocks.0.attn.q", Precision.FP16, (3,)),
        Item("blocks.0.attn.k", Precision.FP16, (-1,)),
        Item("blocks.0.attn.v", Precision.FP16, (-2,)),
        Item("blocks.0.attn.proj", Precision.FP16, (2,)),
        Item("blocks.0.mlp.b", Precision.FP16, (1,)),
        Item("blocks.0.mlp.w3", Precision.FP16, tuple(i % 4 for i in range(data.config.hidden_size))),
        Item("blocks.1.attn.proj", Precision.FP16, tuple(i % 3 for i in range(data.config.hidden_size))),
    )
    state = {name: tensor.numpy() for name, tensor in data.state.items()}
    write_graphs(tmp_path, data.config, state, PrecisionPlan(Precision.FP16, items))
    bundle.variant = lambda precision: {part: tmp_path / name for part, name in variant_files().items()}  # type: ignore[method-assign]
    assert Network(bundle, "fp16", "cpu").blocks[1].proj.scale is not None
    assert relative_error(fused_call(bundle), plain) < 1e-3


def test_widths_that_no_tile_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = golden("uncond")
    network = Network(model_bundle(tmp_path / "a.elfrt", data.config, data.state, ("fp16",)), "fp16", "cpu")
    monkeypatch.setattr(torch_tuning, "SIZES", ((64, 8, 64, 4, 3),))  # heads are 16 wide
    tuner = Tuner(network, torch.float16, 90, tmp_path, ["a GPU"], usable=lambda *_: ([TORCH], {}))
    tuner.prepare(1, 8)
    assert network.choices[1, 8] == Choice(TORCH)
    assert tuner.passed_over == {KERNELS: "no tile fits the model's widths"}
