"""What types the layers of a built engine compute in, asked of the library itself: only on a GPU that runs the plan."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from elf_rt.errors import BackendError
from elf_rt.plans import LIBRARIES, Record, make_log, this_machine

# In this order: "BFloat16" contains "float". Without an execution context the inspector writes short names, with one
# sentences such as "Row major linear FP16 format".
TYPE_WORDS = (("bf16", ("bfloat16", "bf16")), ("fp16", ("half", "fp16")), ("fp32", ("float", "fp32")))


def inspect_denoiser(folder: Path, record: Record) -> dict[str, int] | None:
    """How many layers of the denoiser's engine give each type: {"fp16": 41, "fp32": 3}.

    None where this machine cannot run the plan, or the library tells no types. The plan's files were checked before.

    Raises:
        BackendError: the library refuses the plan although its record fits.
    """
    library, machine = LIBRARIES[record.library], this_machine()
    if library.unavailable() or machine.gpu is None:
        return None
    trt = library.load()
    if record.mismatch(machine, trt.__version__):
        return None
    path = folder / record.engines["denoiser"].file
    log = make_log(trt)
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise BackendError(f"{library.title} refused {path}: {log.errors()}")
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return count_output_types(json.loads(text)) or None


def count_output_types(information: dict[str, Any]) -> dict[str, int]:
    """Layers by the type of their first output; layers whose outputs have another type or none do not count."""
    counts: Counter[str] = Counter()
    for layer in information.get("Layers", []):
        outputs = layer.get("Outputs") if isinstance(layer, dict) else None  # a layer without details is a bare name
        described = str(outputs[0].get("Format/Datatype", "")).lower() if outputs else ""
        for name, words in TYPE_WORDS:
            if any(word in described for word in words):
                counts[name] += 1
                break
    return dict(counts)
