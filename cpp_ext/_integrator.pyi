"""Types of the compiled extension (``bindings.cpp``); what a SlotStep holds is in ``elf_rt.sampling.integrator``."""

from collections.abc import Sequence

from elf_rt.sampling.integrator import SlotStep

def step(slots: Sequence[SlotStep]) -> None: ...
def set_num_threads(count: int) -> None: ...
