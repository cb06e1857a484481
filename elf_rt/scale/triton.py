"""A model repository for NVIDIA's Triton Inference Server: ``elf`` answers whole texts, ``elf_stream`` drafts too.

Triton does not batch decoupled models, which alone may answer more than once, so they are two: Triton batches the
requests of ``elf``, the engine of rows those of ``elf_stream``.
"""

import json
from pathlib import Path

from elf_rt.bundle import atomic_folder
from elf_rt.errors import BundleError
from elf_rt.model import Model
from elf_rt.request import Text

PROBE_STEPS = 8  # of the text that the delay is measured on
DELAY = 0.05  # share of a text's time that Triton waits for others

INPUTS = {  # name -> (type, whether a request may leave it out)
    "PROMPT": ("TYPE_STRING", False),
    "SEED": ("TYPE_UINT64", True),
    "STEPS": ("TYPE_INT32", True),
    "GUIDANCE_SCALE": ("TYPE_FP32", True),
}
OUTPUTS = {"TEXT": "TYPE_STRING", "SEED": "TYPE_UINT64"}
STREAM_INPUTS = {"DRAFTS_EVERY": ("TYPE_INT32", True)}
STREAM_OUTPUTS = {"DRAFT": "TYPE_BOOL", "STEP": "TYPE_INT32", "STEPS": "TYPE_INT32"}

BATCHED = """\
max_batch_size: {max_batch}
dynamic_batching {{
  preferred_batch_size: [ {sizes} ]
  max_queue_delay_microseconds: {delay_us}
  default_queue_policy {{
    timeout_action: REJECT
    allow_timeout_override: true
    max_queue_size: {max_queue}
  }}
}}
"""
STREAMED = """\
max_batch_size: 0
model_transaction_policy { decoupled: true }
"""
MODEL = """\
from elf_rt.scale.triton_model import {name} as TritonPythonModel

__all__ = ["TritonPythonModel"]
"""


def write_repository(
    model: Model, output: Path, *, backend: str, precision: str, threads: int | None, max_batch: int, max_queue: int
) -> float:
    """Write a model repository that serves the bundle of ``model``, at its present place.

    Args:
        backend, precision, threads: as ``elf_rt.load`` takes them.
        max_batch: texts that start together.
        max_queue: requests that may wait, beyond which they are refused.

    Returns:
        the milliseconds that Triton waits for others before it starts a text: a share of a text's time, as measured.

    Raises:
        BundleError: the output exists, or the bundle has no tokenizer.
    """
    if output.exists():
        raise BundleError(f"{output} exists: remove it, or name another output")
    if model.codec.tokenizer is None:
        raise BundleError(f"{model.bundle.folder} has no tokenizer, and Triton's clients send and receive text")
    delay_ms = DELAY * _text_ms(model)
    batching = BATCHED.format(
        max_batch=max_batch,
        sizes=", ".join(str(2**k) for k in range(1, max_batch.bit_length())),  # without 1: a request waits for others
        delay_us=max(1, round(1e3 * delay_ms)),
        max_queue=max_queue,
    )
    parameters = {
        "bundle": str(model.bundle.folder.resolve()),
        "backend": backend,
        "precision": precision,
        "threads": "" if threads is None else str(threads),
        "max_queue": str(max_queue),
    }
    with atomic_folder(output) as work:
        _write_model(work / "elf", model, "Batched", batching, parameters, {}, {"IDS": "TYPE_INT64"})
        _write_model(work / "elf_stream", model, "Streamed", STREAMED, parameters, STREAM_INPUTS, STREAM_OUTPUTS)
    return delay_ms


def _text_ms(model: Model) -> float:
    """The milliseconds of a text with the default preset, from one of few steps."""
    params = model.params()
    probe = Text("a" if model.config.max_input_length else None, seed=0, params=params.replace(steps=PROBE_STEPS))
    model.write([probe])  # sets up what the first call sets up
    (result,) = model.write([probe])
    return result.timings.total_ms / (PROBE_STEPS + 1) * (params.steps + 1)


def _write_model(
    folder: Path,
    model: Model,
    python_class: str,
    settings: str,
    parameters: dict[str, str],
    more_inputs: dict[str, tuple[str, bool]],
    more_outputs: dict[str, str],
) -> None:
    """One model: its configuration and its Python file."""
    inputs = {**INPUTS, **more_inputs}
    if not model.config.max_input_length:  # Triton takes no request without an input
        inputs = {**inputs, "SEED": ("TYPE_UINT64", False)}
        del inputs["PROMPT"]
    place = "kind: KIND_GPU, gpus: [ 0 ]" if model.backend.device == "cuda" else "kind: KIND_CPU"
    blocks = [
        f'name: "{folder.name}"\nbackend: "python"\n{settings}instance_group [ {{ count: 1, {place} }} ]\n',
        *(_tensor("input", name, kind, optional) for name, (kind, optional) in inputs.items()),
        *(_tensor("output", name, kind, False) for name, kind in (OUTPUTS | more_outputs).items()),
        *(
            f"parameters {{ key: {_quoted(k)}, value {{ string_value: {_quoted(v)} }} }}\n"
            for k, v in parameters.items()
        ),
    ]
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text(MODEL.format(name=python_class), encoding="utf-8")
    (folder / "config.pbtxt").write_text("".join(blocks), encoding="utf-8")


def _tensor(side: str, name: str, kind: str, optional: bool) -> str:
    size = -1 if name == "IDS" else 1
    return f'{side} {{ name: "{name}", data_type: {kind}, dims: [ {size} ]{", optional: true" * optional} }}\n'


def _quoted(text: str) -> str:
    """A string of the protobuf text format, which knows JSON's escapes."""
    return json.dumps(text, ensure_ascii=False)
