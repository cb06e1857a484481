"""The text encoder of a conditional model: it runs once a text, on the CPU in float32, whatever runs the network."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from elf_rt.arrays import open_table
from elf_rt.bundle import Bundle
from elf_rt.errors import BackendError, first_line
from elf_rt.libraries import import_library, why_absent
from elf_rt.machine import cores

Encoder = Callable[[np.ndarray, np.ndarray], np.ndarray]  # ids (B, S), mask (B, S) -> latents (B, S, C) float32


def open_encoder(bundle: Bundle, threads: int | None = None) -> Encoder | None:
    """The bundle's encoder, None where it has none. Its latents are not normalised. Safe to share between threads."""
    if bundle.encoder is None:
        return None
    if bundle.encoder.kind == "embedding":
        shape = (bundle.encoder.vocab_size, bundle.config.latent_dim)
        table = open_table(bundle.part(bundle.encoder.files)["table"], shape)
        return lambda ids, mask: np.asarray(table[ids], np.float32)
    return NetworkEncoder(bundle, bundle.encoder.files, threads or cores())


class NetworkEncoder:
    """The bundle's encoder.onnx, opened at the first call.

    Raises:
        BackendError: neither ONNX Runtime nor OpenVINO is installed, or it cannot load the graph.
    """

    def __init__(self, bundle: Bundle, files: Mapping[str, str], threads: int) -> None:
        self._bundle, self._files, self._threads = bundle, files, threads
        self._run: Encoder | None = None
        self._lock = threading.Lock()

    def __call__(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with self._lock:
            if self._run is None:
                self._run = _open(self._bundle.part(self._files)["encoder"], self._threads)
        return self._run(ids, mask)


def _open(path: Path, threads: int) -> Encoder:
    reason = why_absent("onnxruntime", "InferenceSession", "pip install 'elf-rt[cpu]'")
    if reason and why_absent("openvino", "Core", ""):
        raise BackendError(f"a text encoder runs in ONNX Runtime, which is {reason}")
    try:
        return _in_openvino(path, threads) if reason else _in_onnxruntime(path, threads)
    except Exception as error:  # the libraries' own errors have no common base
        raise BackendError(f"cannot load {path}: {first_line(error)}") from error


def _in_onnxruntime(path: Path, threads: int) -> Encoder:
    onnxruntime = import_library("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda ids, mask: np.asarray(session.run(None, {"ids": ids, "mask": mask})[0])


def _in_openvino(path: Path, threads: int) -> Encoder:
    core = import_library("openvino").Core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(path), "CPU", options)
    return lambda ids, mask: np.array(compiled.create_infer_request().infer({"ids": ids, "mask": mask})[0])
