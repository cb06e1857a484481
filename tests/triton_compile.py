"""Compiles the Triton kernels for GPUs that are not here; a program, because Triton's interpreter must be off.

python triton_compile.py 80 90     prints a JSON list: what each kernel takes, and which instructions it has
"""

import json
import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as triton_compile

from elf_rt.backends import torch_kernels as kernels
from elf_rt.backends.torch_kernels import Tile
from elf_rt.backends.torch_tuning import SIZES, TMA

FLOATS, FLOAT, INT = "*fp32", "fp32", "i32"
# In the order of the kernels' arguments, after x and weight; "out" is 16 bits wide.
ARGUMENTS = {
    "heads": ["out", *[FLOATS] * 5, *[INT] * 4, *[FLOAT] * 3, INT],
    "gate": ["out", FLOATS, FLOATS, INT, INT, INT, FLOAT, INT],
    "add": [FLOATS, "out", *[FLOATS] * 5, INT, INT, INT, FLOAT, INT],
}
ALIGNED = ("N", "K", "H")  # multiples of 16 in every released model


def compiled(kind: str, sm: int, tile: Tile) -> dict[str, object]:
    kernel = getattr(kernels, f"{kind}_kernel")
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "TMA": tile.tma}
    if kind == "heads":
        constants["D"] = 64
    inputs = [f"tensordesc<fp16[{n}, {tile.depth}]>" if tile.tma else "*fp16" for n in (tile.rows, tile.columns)]
    types = inputs + [("*fp16" if t == "out" else t) for t in ARGUMENTS[kind]] + ["constexpr"] * len(constants)
    names = [name for name in kernel.arg_names if name not in constants] + list(constants)
    signature = dict(zip(names, types, strict=True))
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in ALIGNED
    }
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    made = triton_compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    ptx = made.asm["ptx"]
    found = {name: name in ptx for name in ("wgmma", "tcgen05.mma", "mma.sync", "cp.async.bulk.tensor", "cp.async")}
    return {"kernel": kind, "sm": sm, "shared": made.metadata.shared, **found}


if __name__ == "__main__":
    first = SIZES[0]
    print(
        json.dumps([compiled(k, sm, Tile(*first, tma=sm >= TMA)) for sm in map(int, sys.argv[1:]) for k in ARGUMENTS])
    )
