"""What 16 bits do to the text, and which operations leave them again so that the text stays.

Here only the lost digits count: bfloat16 overflows nowhere, and FP16 graphs scale by powers of two what would. How much
the rounding changes x tells which operation to blame; how many have to leave bfloat16 is found by writing texts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elf_rt.export.precision import Precision
from elf_rt.export.reference import ELF, Block, RMSNorm
from elf_rt.export.replay import Call, Run, sample
from elf_rt.manifest import TokenizerPart

OPERATIONS = ("attn", "attn.qkv", "attn.proj", "mlp.w12", "mlp.w3")
KEPT_AGREEMENT = 0.9975  # so many tokens must stay, so that a proof on few texts finds the 0.99 of verify
RANKING_CALLS = 4

Rounding = Callable[[Tensor], Tensor]


def _bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def _float16(x: Tensor) -> Tensor:
    """To the 11 binary digits of FP16, whatever the size of the number."""
    digits, exponent = torch.frexp(x)
    return torch.ldexp((digits * 2048).round() / 2048, exponent)


ROUND: dict[Precision, Rounding] = {Precision.BF16: _bfloat16, Precision.FP16: _float16}


def engine_agreement(model: ELF, runs: Sequence[Run], ids: Sequence[Tensor], special: TokenizerPart) -> float:
    """Share of tokens that stay the same when an engine rounds the float32 graphs by itself, as OpenVINO does.

    No graph of the bundle tells what such an engine computes, so nothing can be proven by replaying one; here the
    reference rounds as it does: every weight, the inputs of every product, what norms write, the residual.
    ids: what the runs write in float32. special: where padding and the end of a text are told from.
    """
    with _rounding(module for module in model.modules() if isinstance(module, (nn.Linear, RMSNorm, Block))):
        return _agreement(model, runs, ids, special)


def operations_to_keep(
    model: ELF, runs: Sequence[Run], ids: Sequence[Tensor], special: TokenizerPart
) -> dict[str, float]:
    """Operations of the blocks that stay float32 in the bfloat16 graphs; how much each alone would change x.

    The fewest, worst first, with which KEPT_AGREEMENT of the tokens stay the same.
    """
    names = _operations(model)

    def stays(kept: Sequence[str]) -> bool:
        with _rounding(module for name in names if name not in kept for module in _modules(model, name)):
            return _agreement(model, runs, ids, special) >= KEPT_AGREEMENT

    if stays(()):
        return {}
    errors = most_sensitive(model, runs, Precision.BF16)
    worst_first = list(errors)
    enough, too_few = len(names), 0
    while enough - too_few > 1:
        tried = (enough + too_few) // 2
        enough, too_few = (tried, too_few) if stays(worst_first[:tried]) else (enough, tried)
    return {name: errors[name] for name in worst_first[:enough]}


def most_sensitive(model: ELF, runs: Sequence[Run], precision: Precision) -> dict[str, float]:
    """Every operation of the blocks, worst first: how much rounding it alone to a 16-bit type changes x, relative."""
    names = _operations(model)
    errors = dict(zip(names, _errors(model, names, runs, ROUND[precision]), strict=True))
    return {name: errors[name] for name in sorted(errors, key=lambda name: -errors[name])}


def _operations(model: ELF) -> list[str]:
    return [f"blocks.{block}.{operation}" for block in range(model.config.depth) for operation in OPERATIONS]


def _modules(model: ELF, operation: str) -> list[nn.Module]:
    """What is rounded where an operation runs in bfloat16: a linear layer, or what attention multiplies."""
    module = model.get_submodule(operation)
    return (
        [module] if isinstance(module, nn.Linear) else [module.get_submodule("q_norm"), module.get_submodule("k_norm")]
    )


def _agreement(model: ELF, runs: Sequence[Run], ids: Sequence[Tensor], special: TokenizerPart) -> float:
    """In the run where it is least. Without a source a conditional model has nothing to say, so such runs count only
    where all are."""
    conditional = any(run.cond is not None for run in runs)
    counted = [pair for pair in zip(runs, ids, strict=True) if not conditional or pair[0].cond is not None]
    return min(text_agreement(sample(model, run)[1], exact, run.mask, special) for run, exact in counted)


def text_agreement(ids: Tensor, exact: Tensor, mask: Tensor | None, special: TokenizerPart) -> float:
    """Share of equal tokens of ids (B, L), of those that are read in one of both; mask (B, L) is true at the source."""
    source = None if mask is None else mask.numpy()
    read = np.logical_or(
        *(read_positions(i.numpy(), source, pad_id=special.pad_id, eos_id=special.eos_id) for i in (ids, exact))
    )
    return float((ids == exact).numpy()[read].mean()) if read.any() else 1.0


@torch.no_grad()
def _errors(model: ELF, operations: Sequence[str], runs: Sequence[Run], rounded: Rounding) -> list[float]:
    """How much the rounding of each operation alone changes x, relative, over calls of the first run."""
    seen: list[Call] = []
    sample(model, runs[0], seen.append)
    chosen = [seen[i] for i in np.linspace(0, len(seen) - 2, RANKING_CALLS).astype(int)]  # the last one decodes
    calls = [tuple(tensor[:1] for tensor in call) for call in chosen]
    exact = [model(*call)[0] for call in calls]
    errors = []
    for operation in operations:
        with _rounding(_modules(model, operation), rounded):
            changes = [float((model(*call)[0] - x).norm() / x.norm()) for call, x in zip(calls, exact, strict=True)]
        errors.append(float(np.sqrt(np.mean(np.square(changes)))))
    return errors


@contextmanager
def _rounding(modules: Iterable[Any], rounded: Rounding = _bfloat16) -> Iterator[None]:
    """Inside the context the outputs of the modules are rounded, and of linear layers weights and inputs too."""

    def inputs(module: Any, values: tuple[Tensor]) -> tuple[Tensor]:
        return (rounded(values[0]),)

    def output(module: Any, values: Any, result: Tensor) -> Tensor:
        return rounded(result)

    with ExitStack() as stack:
        for module in modules:
            if isinstance(module, nn.Linear):
                stack.callback(setattr, module.weight, "data", module.weight.data)
                module.weight.data = rounded(module.weight.data)
                stack.callback(module.register_forward_pre_hook(inputs).remove)
            stack.callback(module.register_forward_hook(output).remove)
        yield


def read_positions(ids: np.ndarray, source: np.ndarray | None, *, pad_id: int, eos_id: int) -> np.ndarray:
    """Which of the ids (B, L) are read: neither the source, where `source` (B, L) is true, nor padding, nor what comes
    after the first EOS."""
    free = np.ones(ids.shape, bool) if source is None else ~source
    ends = (ids == eos_id) & free
    return free & ((ids != pad_id) | ends) & (np.cumsum(ends, axis=1) - ends == 0)
