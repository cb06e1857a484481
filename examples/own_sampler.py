"""Try a sampler of your own as a table of coefficients: python own_sampler.py BUNDLE"""

import sys

import numpy as np

import elf_rt
from elf_rt.sampling.schedule import MAIN, Table

STEPS = 8
# Euler steps on a quadratic grid: row 0 starts from noise, rows 1 .. N prepare the calls, row N + 1 the decoding one.
grid = np.linspace(0, 1, STEPS + 1) ** 2
kappa = np.diff(grid) / (1 - grid[:-1])
coef = np.zeros((STEPS + 2, 5))  # A, B, C, D, X: z <- A z + B x̂ + C x̂_last + D noise, next x_prev = X x̂
coef[0, 3] = 2.0  # the noise that the model was trained on
coef[1, 0] = 1.0
coef[2:, 0], coef[2:, 1] = 1 - kappa, kappa
coef[1:-1, 4] = 1.0
weights = np.ones((STEPS + 2, 1))
table = Table(np.array([0.0, *grid[:-1], 1.0]), coef, weights, (MAIN,))

with elf_rt.load(sys.argv[1]) as model:
    outcome = model.sample(seeds=[0, 1], table=table, params=model.params(sc_cfg=1.0))
    for ids in outcome.ids:
        print(model.codec.decode(model.codec.finish(ids[None], None)[0]))
