"""How much of the text stays when an engine rounds the float32 graphs to bfloat16 by itself, as OpenVINO does.

No graph of the bundle tells what such an engine computes, so nothing can be proven by replaying one. The reference
can be made to round as the engine does, and its tokens compared with its own in float32.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from elf_rt.export.reference import ELF, Block, RMSNorm
from elf_rt.export.replay import Run, sample


def bf16_agreement(model: ELF, runs: Sequence[Run], ids: Sequence[Tensor]) -> float:
    """Share of tokens that stay the same, in the run where that is least. ids: what the runs write in float32.

    Where some runs have a source, the others do not count: without one, a conditional model has nothing to say.
    """
    conditional = any(run.cond is not None for run in runs)
    counted = [pair for pair in zip(runs, ids, strict=True) if not conditional or pair[0].cond is not None]
    with _rounding(model):
        return min(float((sample(model, run)[1] == exact).float().mean()) for run, exact in counted)


@contextmanager
def _rounding(model: ELF) -> Iterator[None]:
    """Inside the context every weight, the inputs of every product, what norms write and the residual are bfloat16."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                stack.callback(setattr, module.weight, "data", module.weight.data)
                module.weight.data = _round(module.weight.data)
                stack.callback(module.register_forward_pre_hook(lambda _, inputs: (_round(inputs[0]),)).remove)
            if isinstance(module, (nn.Linear, RMSNorm, Block)):
                stack.callback(module.register_forward_hook(_round_output).remove)
        yield


def _round_output(module: Any, inputs: Any, output: Tensor) -> Tensor:
    return _round(output)


def _round(x: Tensor) -> Tensor:
    return x.bfloat16().float()
