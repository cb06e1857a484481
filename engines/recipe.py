"""What differs between TensorRT and TensorRT-RTX when they build, as data, not branches."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from elf_rt.errors import BackendError
from elf_rt.plans import TENSORRT, TENSORRT_RTX, Library, Machine


@dataclass(frozen=True)
class Recipe:
    """One library's way of building.

    sms: compute capabilities that it can build for on any machine; empty: only for the GPU at hand.
    alone: those that share a plan with no other. no_fp32, no_bf16: those without such matrix products.
    operators: ONNX operator -> the first version that parses it; an older one is told to export with --opset 20.
    """

    library: Library
    oldest: str
    sms: tuple[int, ...]
    timing_cache: bool
    flags: tuple[str, ...] = ()
    operators: Mapping[str, str] = field(default_factory=dict)
    alone: tuple[int, ...] = ()
    no_fp32: tuple[int, ...] = ()
    no_bf16: tuple[int, ...] = ()

    def check_version(self, version: str) -> None:
        if version_tuple(version) < version_tuple(self.oldest):
            raise BackendError(f"{self.library.title} {version} is too old: elf-rt needs {self.oldest} or later")

    def too_old_for(self, version: str, complaint: str) -> str | None:
        """The operator in a parser's complaint that this version does not know yet, with the version that does."""
        for operator, first in self.operators.items():
            if operator in complaint and version_tuple(version) < version_tuple(first):
                return f"{operator} needs {self.library.title} {first}, this is {version}"
        return None

    def cannot_target(self, asked: tuple[int, ...], machine: Machine) -> str | None:
        """Why --target auto passes this library over, or None."""
        try:
            self.groups(asked, "fp16", machine)
        except BackendError as error:
            return str(error)
        return None

    def groups(self, asked: tuple[int, ...], precision: str, machine: Machine) -> list[tuple[int, ...]]:
        """The compute capabilities to build for, one plan for each group.

        Args:
            asked: what --sm names; empty: the GPU at hand, or without one all that can share one plan.
        """
        here = machine.gpu.sm if machine.gpu else None
        if not self.sms:
            return [self._only_here(asked, here, machine.no_gpu)]
        if not asked:
            asked = (here,) if here else tuple(sm for sm in self.sms if sm not in self.alone)
        for sm in asked:
            if sm not in self.sms:
                names = ", ".join(map(str, self.sms))
                mend = "build with --target tensorrt on that machine" if sm in (87, 90, 100, 103, 110) else "check --sm"
                raise BackendError(f"{self.library.title} cannot build for sm_{sm}, only for {names}: {mend}")
            if precision == "bf16" and sm in self.no_bf16:
                raise BackendError(f"sm_{sm} has no bfloat16: build with --precision fp16")
            if precision == "fp32" and sm in self.no_fp32:
                raise BackendError(
                    f"{self.library.title} has no float32 matrix product on sm_{sm}: build with --precision fp16"
                )
        together = tuple(sorted({sm for sm in asked if sm not in self.alone}))
        return ([together] if together else []) + [(sm,) for sm in sorted(set(asked) & set(self.alone))]

    def _only_here(self, asked: tuple[int, ...], here: int | None, no_gpu: str) -> tuple[int, ...]:
        if here is None:
            raise BackendError(
                f"{self.library.title} builds on the GPU that the plan will run on, and here is none ({no_gpu}): "
                "build on that machine, or ahead with --target tensorrt-rtx --sm ..."
            )
        if asked and set(asked) != {here}:
            raise BackendError(
                f"{self.library.title} builds only for the GPU of this machine (sm_{here}): leave --sm out, or give "
                "--target tensorrt-rtx"
            )
        return (here,)


RECIPES = {  # in the order in which --target auto asks for them
    # Compiles for the GPU of the machine that it runs on, and times kernels while it does.
    "tensorrt": Recipe(
        library=TENSORRT,
        oldest="10.3",  # JetPack 6; strongly typed networks and 64-bit memory sizes are there
        sms=(),
        timing_cache=True,
        operators={"Attention": "10.14", "RMSNormalization": "10.15", "RotaryEmbedding": "10.15"},
    ),
    # Compiles ahead for any GeForce or RTX GPU, without one; the GPU's own driver finishes the kernels at load.
    "tensorrt-rtx": Recipe(
        library=TENSORRT_RTX,
        oldest="1.5",
        sms=(75, 80, 86, 89, 120, 121),  # no Hopper (90) and no Orin (87): those need TensorRT
        timing_cache=False,  # nothing is timed
        flags=("REQUIRE_USER_ALLOCATION",),  # the plan allocates nothing while it runs: a CUDA graph can capture it
        alone=(75,),  # a plan for Turing holds nothing else
        no_fp32=(75,),  # it has no float32 matrix product for Turing; FP16 graphs have none
        no_bf16=(75,),
    ),
}


def version_tuple(version: str) -> tuple[int, ...]:
    """ "10.13.0.35" -> (10, 13, 0, 35); a part that is no number ends it."""
    numbers: list[int] = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
