"""Types of the compiled extension (``bindings.cpp``); what each argument means is in ``elf_rt.sampling.integrator``."""

from collections.abc import Sequence

import numpy as np

from elf_rt.sampling.noise import NoiseKey
from elf_rt.sampling.schedule import Row

def step(
    z: np.ndarray,
    x_last: np.ndarray,
    *,
    x_rows: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    coef: np.ndarray,
    noise: np.ndarray | NoiseKey | None = None,
    source: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    next_z: np.ndarray | None = None,
    next_x_prev: np.ndarray | None = None,
    rows: Sequence[Row] = (),
) -> None: ...
def set_num_threads(count: int) -> None: ...
