"""Write texts: python generate.py BUNDLE [PROMPT]"""

import sys

import elf_rt

with elf_rt.load(sys.argv[1]) as model:
    for result in model.generate(sys.argv[2:] or None, n=2, seed=0, steps=8):
        print(f"{result.seed}: {result.text}  ({result.timings.total_ms:.0f} ms, {result.timings.calls} calls)")
