"""How the torch backend's network runs on this GPU: measured once for each shape, kept in the user's cache.

What is chosen: whose attention, the tiles of the Triton kernels, and whether these kernels run the blocks at all or
torch's products do. A way that does not work here, or whose results differ, is left out with its reason: so nothing
becomes slower than torch.compile is, nor wrong.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from elf_rt.backends import torch_attention
from elf_rt.backends.torch_attention import Attention
from elf_rt.backends.torch_cuda import clear_workspaces, own_settings
from elf_rt.backends.torch_network import Choice, Network
from elf_rt.backends.torch_weights import why_not
from elf_rt.errors import first_line
from elf_rt.files import read_sealed, write_sealed
from elf_rt.machine import user_cache

if TYPE_CHECKING:
    from elf_rt.backends.torch_fused import FusedBlocks
    from elf_rt.backends.torch_kernels import Tile

Ways = Sequence[Callable[[], object]]
Clock = Callable[[Ways, int], list[float | str]]  # milliseconds of a call of each, or why it does not work

OLDEST = 80  # compute capability with bfloat16 and asynchronous copies
TMA = 90  # the first with a unit that loads tiles
KERNEL_CALLS, NETWORK_CALLS = 10, 2  # calls in a graph that is timed
ROUNDS = 7  # how often, all ways in turn
DIFFERENCE = {torch.float16: 0.05, torch.bfloat16: 0.1}  # of two right ways, at most; a wrong one differs by far more
# (rows, columns, depth, warps, stages) of a tile. Every GPU has the shared memory for the first.
SIZES = (
    (64, 128, 64, 4, 3),
    (128, 128, 64, 8, 3),
    (64, 128, 64, 8, 4),
    (128, 128, 64, 4, 3),
    (64, 64, 64, 4, 4),
    (128, 256, 64, 8, 3),
)
MOST_ADDED = 128  # columns of a tile of ``torch_kernels.add``, which holds h beside its product
KERNELS = "Triton kernels"
_log = logging.getLogger(__name__)


@dataclass
class Tuner:
    """Chooses for one network.

    Args:
        precision: of its products.
        sm: compute capability, 90 for 9.0.
        folder: of what was measured, a sealed file for each shape.
        made_with: the GPU, versions and sources that measurements hold for.
        tune: measure what the folder does not hold; without it, the first attention that can be asked for and torch's
            products.
    """

    network: Network
    precision: torch.dtype
    sm: int
    folder: Path
    made_with: Sequence[str]
    tune: bool = True
    clock: Clock = field(default_factory=lambda: gpu_clock)
    usable: Callable[..., tuple[list[Attention], dict[str, str]]] = torch_attention.usable
    passed_over: dict[str, str] = field(default_factory=dict)  # why, by way

    def __post_init__(self) -> None:
        if reason := why_not(self.network.blocks) if self.tune else "not measured (--no-tune)":
            self.passed_over[KERNELS] = reason
        elif isinstance(fused := make_fused(self.network, self.sm), str):
            self._refuse_kernels(fused)
        else:
            self.network.fused = fused

    def _refuse_kernels(self, why: str) -> None:
        """They should work here, and do not."""
        self.passed_over[KERNELS] = why
        _log.warning("torch's products run instead of the Triton kernels, which may be slower: %s", why)

    def prepare(self, rows: int, length: int) -> None:
        """Choose for this shape, unless that was done."""
        if (rows, length) in self.network.choices:
            return
        config, width = self.network.config, self.network.blocks[0].head_bias.shape[-1]
        size = config.num_prefix_tokens + length
        attentions, absent = self.usable(self.precision, (rows, config.num_heads, size, width))
        self.passed_over |= absent
        file = self._file(rows, length)
        choice = self._stored(file, attentions) if self.tune else Choice(attentions[0])
        if choice is None:
            try:
                with torch.inference_mode(), own_settings(torch):
                    choice = self._measured(rows, length, attentions)
                tiles = {product: astuple(tile) for product, tile in (choice.tiles or {}).items()}
                entry = {"attention": choice.attention.name, "tiles": tiles, "why": self.passed_over.get(KERNELS)}
                write_sealed(file, json.dumps(entry).encode(), "measurements")
            except torch.OutOfMemoryError:  # measuring takes more than running
                choice = Choice(attentions[0])
                self.passed_over[KERNELS] = f"no GPU memory to measure {rows} rows of {length} tokens"
        self.network.choices[rows, length] = choice

    def describe(self) -> dict[str, str]:
        """What was chosen for the shapes so far, and why not the rest."""
        chosen = self.network.choices.values()
        attention = dict.fromkeys(choice.attention.library for choice in chosen)
        blocks = dict.fromkeys(KERNELS if choice.tiles else "torch's products" for choice in chosen)
        why = [f"{way}: {reason}" for way, reason in self.passed_over.items()]
        return {"attention": ", ".join(attention), "blocks": ", ".join(blocks), "passed over": "; ".join(why)}

    def _file(self, rows: int, length: int) -> Path:
        """Where a shape's choice is kept: named by all that it holds for, but the attentions that are installed."""
        config, block = self.network.config, self.network.blocks[0]
        heads, width = block.head_bias.shape[1:]
        widths = f"{config.depth}x{config.hidden_size} {heads}x{width} {block.w3.weight.shape[1]}"
        ways = "both" if self.network.fused is not None else "torch"
        key = "\0".join((*self.made_with, f"{self.precision} {widths} {rows}x{length} {ways}"))
        return self.folder / f"torch-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def _stored(self, file: Path, attentions: list[Attention]) -> Choice | None:
        """What was measured before, if that attention can still be asked for."""
        entry: dict[str, Any] = json.loads(read_sealed(file) or b"{}")
        attention = next((a for a in attentions if a.name == entry.get("attention")), None)
        if attention is None:
            return None
        if not entry["tiles"]:
            self.passed_over[KERNELS] = entry["why"]
            return Choice(attention)
        from elf_rt.backends.torch_kernels import Tile

        return Choice(attention, {product: Tile(*tile) for product, tile in entry["tiles"].items()})

    def _measured(self, rows: int, length: int, attentions: list[Attention]) -> Choice:
        """The fastest attention; with it, the fastest of the calls that agree with torch's."""
        network, size = self.network, self.network.config.num_prefix_tokens + length
        plain = Choice(self._fastest_attention(attentions, rows, size))
        if network.fused is None or (tiles := self._fastest_tiles(network.fused, rows, size)) is None:
            return plain
        fused, call = Choice(plain.attention, tiles), Call(network, rows, length)
        if why := refusal(lambda: call.run(fused), call.run(plain).clone(), DIFFERENCE[self.precision]):
            self._refuse_kernels(why)
            return plain
        torchs, ours = self.clock([lambda: call.run(plain), lambda: call.run(fused)], NETWORK_CALLS)
        if isinstance(ours, str):
            self._refuse_kernels(ours)
        elif isinstance(torchs, float) and torchs <= ours:
            self.passed_over[KERNELS] = f"{ours:.3g} ms a call of {rows} x {length}, torch {torchs:.3g}"
        else:
            return fused
        return plain

    def _fastest_attention(self, attentions: list[Attention], rows: int, size: int) -> Attention:
        heads, width = self.network.blocks[0].head_bias.shape[1:]
        q, k, v = (normal(self.network, rows, size, heads, width).to(self.precision) for _ in range(3))
        scale = self.network.config.head_dim**-0.5
        expected, ways = torch_attention.TORCH.run(q, k, v, scale), {}
        for attention in attentions:
            way = partial(attention.run, q, k, v, scale)
            if why := refusal(way, expected, DIFFERENCE[self.precision]):
                self.passed_over[attention.library] = why
            else:
                ways[attention] = way
        return self._fastest(ways, lambda a: a.library) or torch_attention.TORCH

    def _fastest_tiles(self, fused: "FusedBlocks", rows: int, size: int) -> "dict[str, Tile] | None":
        """Of each product alone, on numbers like those that it will get."""
        runs = fused.products(lambda *shape: normal(self.network, *shape), rows, size)
        chosen: dict[str, Tile] = {}
        for product, possible in tiles_of(fused, self.sm).items():
            ways = {tile: partial(runs[product], tile) for tile in possible}
            best = self._fastest(ways, lambda _: KERNELS)
            if best is None:
                self._refuse_kernels(self.passed_over.get(KERNELS, "no tile fits the model's widths"))
                return None
            chosen[product] = best
        self.passed_over.pop(KERNELS, None)  # the reasons of single tiles do not count any more
        return chosen

    def _fastest(self, ways: Mapping[Any, Callable[[], object]], name: Callable[[Any], str]) -> Any | None:
        """The key of the fastest way that works."""
        if len(ways) < 2:
            return next(iter(ways), None)
        timed = dict(zip(ways, self.clock(list(ways.values()), KERNEL_CALLS), strict=True))
        self.passed_over |= {name(way): reason for way, reason in timed.items() if isinstance(reason, str)}
        works = {way: ms for way, ms in timed.items() if isinstance(ms, float)}
        return min(works, key=lambda way: works[way], default=None)


def tuner_here(network: Network, precision: torch.dtype, tune: bool) -> Tuner:
    """For the current GPU, with what was measured on it."""
    major, minor = torch.cuda.get_device_capability()
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("torch_*.py")))
    libraries = torch.__version__, str(torch.version.cuda), torch_attention.cudnn_version(), triton_version()
    made_with = torch.cuda.get_device_name(), f"{major}.{minor}", *libraries, hashlib.sha256(sources).hexdigest()
    return Tuner(network, precision, 10 * major + minor, user_cache() / "tuning", made_with, tune)


def triton_version() -> str:
    """Empty where there is none."""
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)


class Call:
    """A denoising call on random numbers."""

    def __init__(self, network: Network, rows: int, length: int) -> None:
        config = network.config
        self._network = network
        self._z, self._x_prev, self.x = (normal(network, rows, length, config.latent_dim) for _ in range(3))
        self._hidden = normal(network, rows, length, config.hidden_size)
        self._t = torch.linspace(0, 1, rows, device=self._z.device)

    def run(self, choice: Choice) -> Tensor:
        """x, which the next call overwrites."""
        config, t = self._network.config, self._t
        x_prev = self._x_prev if config.self_cond else None
        s = t + 1 if config.num_self_cond_cfg_tokens else None
        mode = 0 * t if config.num_model_mode_tokens else None
        self._network.denoise(self._z, x_prev, t, s, mode, self.x, self._hidden, choice)
        return self.x


def refusal(way: Callable[[], Tensor], expected: Tensor, most: float) -> str | None:
    """Why a way does not do, or None when it gives what a trusted one gave."""
    try:
        difference = float((way() - expected).norm() / expected.norm())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton's and the driver's have no common base
        return first_line(error)
    return None if difference < most else f"results differ by {difference:.2g}"


def make_fused(network: Network, sm: int) -> "FusedBlocks | str":
    """The network's blocks for the Triton kernels, or why there are none."""
    if sm < OLDEST:
        return f"they need a GPU of compute capability {OLDEST / 10} or newer"
    try:
        from elf_rt.backends.torch_fused import FusedBlocks
    except ImportError as error:
        return f"Triton does not work here ({first_line(error)})"
    return FusedBlocks(network.blocks, network.cos, network.sin, network.eps, network.config.head_dim)


def tiles_of(fused: "FusedBlocks", sm: int) -> dict[str, list["Tile"]]:
    """The tiles that each product of a block can have."""
    from elf_rt.backends.torch_kernels import MOST_TILES, Tile

    block = fused.blocks[0]
    hidden, inner = len(block.norm1), len(block.w12) // 2
    widths = hidden, inner, fused.heads * fused.width
    tiles = [Tile(*size, tma=sm >= TMA and not any(width % 8 for width in widths)) for size in SIZES]
    adding = [t for t in tiles if t.columns <= MOST_ADDED and hidden <= t.columns * MOST_TILES.value]
    return {"qkv": [t for t in tiles if t.columns >= fused.width], "proj": adding, "w12": tiles, "w3": adding}


def normal(network: Network, *shape: int) -> Tensor:
    return torch.randn(shape, device=network.cos.device)


def gpu_clock(ways: Ways, calls: int) -> list[float | str]:
    """Milliseconds of a call of each on the GPU, or why it does not work: the least of several replays of its graph,
    the ways in turn, because a GPU's clock changes."""
    stream, graphs = torch.cuda.Stream(), [captured(way, calls) for way in ways]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    times: list[float | str] = [graph if isinstance(graph, str) else float("inf") for graph in graphs]
    with torch.cuda.stream(stream):
        for _, (i, graph) in itertools.product(range(ROUNDS), enumerate(graphs)):
            if isinstance(graph, str):
                continue
            events[0].record()
            graph.replay()
            events[1].record()
            stream.synchronize()
            times[i] = min(float(times[i]), events[0].elapsed_time(events[1]) / calls)
    return times


def captured(way: Callable[[], object], calls: int) -> "torch.cuda.CUDAGraph | str":
    """A graph of so many calls, or why there is none."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    try:
        with torch.cuda.stream(stream):
            way()  # compiles
            stream.synchronize()
            clear_workspaces(torch)
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                for _ in range(calls):
                    way()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # torch's, Triton's and the driver's have no common base
        return first_line(error)
    finally:
        clear_workspaces(torch)  # cuBLAS keeps workspaces in the graph's memory
    return graph
