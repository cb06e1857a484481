"""The graphs of a bundle in each precision, each proven by replaying it; one that is not becomes no part of the bundle.

float32 must be proven. Of a 16-bit precision that is not, more operations stay float32, the most sensitive first, until
it is or REMEDY_SECONDS are over; then it is left out, and the manifest says why.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from elf_rt.bundle import write_manifest
from elf_rt.errors import InputError
from elf_rt.export.checkpoint import Checkpoint
from elf_rt.export.graph import variant_files, write_graphs
from elf_rt.export.planner import plan_precision
from elf_rt.export.precision import FP32, Precision
from elf_rt.export.quantize import Calibration, calibrate, write_int8
from elf_rt.export.quantize_openvino import write_openvino_int8
from elf_rt.export.ranges import Ranges, measure_ranges
from elf_rt.export.reference import ELF
from elf_rt.export.replay import Run
from elf_rt.export.sensitivity import engine_agreement, most_sensitive, operations_to_keep
from elf_rt.manifest import TokenizerPart

REMEDY_SECONDS = 120  # how long a 16-bit precision that is not proven is mended
SHARES = (0.25, 0.5, 0.75)  # of the blocks' operations that are tried in float32; with all of them nothing is gained


class Proof(Protocol):
    """What a replay found: `elf_rt.measure.verify.VerifyReport`."""

    @property
    def passed(self) -> bool: ...
    @property
    def summary(self) -> str: ...


class PrecisionWriter:
    """Writes variants into a bundle's folder and proves them. `manifest` holds what the folder has; `notes` tells it.

    Args:
        measured, calibrated: runs to measure activations with, and fewer steps of them for int8.
        special: ids that tell what of a text is read.
        prove: replays a variant of the folder.
        required: variants that must be proven, unless `keep_unproven` lets them stay without it.
    """

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        checkpoint: Checkpoint,
        model: ELF,
        *,
        opset: int,
        measured: Sequence[Run],
        calibrated: Callable[[], Sequence[Run]],
        special: TokenizerPart,
        prove: Callable[[Path, str], Proof],
        required: Sequence[str] = (),
        keep_unproven: bool = False,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.folder, self.checkpoint, self.model, self.opset = folder, checkpoint, model, opset
        self.manifest = manifest | {"variants": {}, "precision": {}, "left_out": {}, "unproven": {}}
        self.notes: list[str] = []
        self._runs, self._calibrated, self._special = measured, calibrated, special
        self._prove_variant, self._required, self._keep = prove, required, keep_unproven
        self._say = say
        self._state = {name: tensor.numpy() for name, tensor in checkpoint.state.items()}
        self._calibration: Calibration | None = None
        self._ranges: Ranges

    def write(self, precisions: Sequence[str]) -> None:
        """All variants. Raises InputError: float32 or a required variant is not proven."""
        self._say("writing the fp32 graphs")
        write_graphs(self.folder, self.checkpoint.config, self._state, FP32, self.opset)
        proof = self._prove("fp32", variant_files(), None)
        if not proof.passed:
            raise InputError(f"the fp32 graphs do not repeat the reference model ({proof.summary}); no bundle written")
        self._say("measuring activations")
        self._ranges = measure_ranges(self.model, self._runs)
        self._say("measuring what bf16 changes")
        agreement = {"bf16": engine_agreement(self.model, self._runs, self._ranges.ids, self._special)}
        self.manifest |= {"agreement": agreement}
        for name in precisions:
            if name in ("fp16", "bf16"):
                self._write_16_bits(Precision(name))
            elif name.startswith("int8"):
                self._write_int8(name)
        write_manifest(self.folder, self.manifest)

    def _write_16_bits(self, precision: Precision) -> None:
        """As many operations as possible in 16 bits: each attempt keeps more of them in float32 than the one before."""
        name, until = precision.value, time.monotonic() + REMEDY_SECONDS
        for attempt in self._attempts(precision):
            self._say(f"writing the {name} graphs")
            plan = plan_precision(precision, self.checkpoint.config, self._state, self._ranges, attempt)
            (self.folder / name).mkdir(exist_ok=True)
            write_graphs(self.folder / name, self.checkpoint.config, self._state, plan, self.opset)
            proof = self._prove(name, variant_files(f"{name}/"), plan.to_json())
            if proof.passed or time.monotonic() > until:
                break
        if not proof.passed:
            self._give_up(name, proof)

    def _attempts(self, precision: Precision) -> Any:
        """What stays float32, in the order in which it is tried."""
        first: dict[str, float] = {}
        if precision is Precision.BF16:
            first = operations_to_keep(self.model, self._runs, self._ranges.ids, self._special)
        yield first
        self._say(f"looking for what {precision.value} must keep in float32")
        ranked = most_sensitive(self.model, self._runs, precision)
        for share in SHARES:
            if (count := round(share * len(ranked))) > len(first):
                yield dict(list(ranked.items())[:count])

    def _give_up(self, name: str, proof: Proof) -> None:
        if name in self._required and not self._keep:
            raise InputError(
                f"the {name} graphs do not repeat the reference model ({proof.summary}); no bundle written. "
                "Leave --precision out to have the bundle without them, or add --keep-unproven"
            )
        if name in self._required:
            self.manifest["unproven"][name] = proof.summary
            self.notes.append(f"warning: {name} is kept unproven: {proof.summary}")
            return
        shutil.rmtree(self.folder / name)
        del self.manifest["variants"][name], self.manifest["precision"][name]
        self.manifest["left_out"][name] = proof.summary
        self.notes.append(f"warning: {name} is left out, it would write other text: {proof.summary}")

    def _write_int8(self, name: str) -> None:
        if self._calibration is None:
            self._say("measuring what int8 changes")
            self._calibration = calibrate(self.model, self._calibrated())
        self._say(f"writing the {name} graphs")
        if name == "int8":
            (self.folder / name).mkdir()
            write_int8(self.folder, self.folder / name, self._calibration)
            files = variant_files(f"{name}/")
        else:
            files = write_openvino_int8(self.folder, self.model, self._runs, list(self._calibration.kept))
        self._prove(name, files, self._calibration.to_json())

    def _prove(self, name: str, files: dict[str, str], plan: Mapping[str, Any] | None) -> Proof:
        self.manifest["variants"][name] = files
        if plan is not None:
            self.manifest["precision"][name] = plan
        write_manifest(self.folder, self.manifest)
        self._say(f"replaying the {name} bundle")
        proof = self._prove_variant(self.folder, name)
        if name.startswith("int8"):  # no proof is claimed: it is never chosen unless asked for
            what = f"not the float32 text: {proof.summary}; --precision int8 asks for it, auto never does"
            self.notes.append(what)
        elif proof.passed:
            self.notes.append(f"proven: {proof.summary}")
        return proof
