"""The text encoder of a conditional model, for GPU backends: it runs once a text, so on the CPU, by ONNX Runtime."""

import threading
from typing import Any

import numpy as np

from elf_rt.bundle import Bundle
from elf_rt.errors import BackendError
from elf_rt.libraries import import_library, why_absent


class CpuEncoder:
    """The bundle's encoder.onnx, opened at the first call. Safe to share between threads."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._session: Any = None
        self._lock = threading.Lock()

    def __call__(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """(B, S) int64 ids and mask -> (B, S, C) float32 latents, not normalised.

        Raises:
            BackendError: ONNX Runtime is not installed.
        """
        with self._lock:
            if self._session is None:
                self._session = self._open()
        return np.asarray(self._session.run(None, {"ids": ids, "mask": mask})[0])

    def _open(self) -> Any:
        path = self._bundle.encoder_graph()
        if reason := why_absent("onnxruntime", "InferenceSession", "pip install 'elf-rt[cpu]'"):
            raise BackendError(f"a text encoder runs in ONNX Runtime, which is {reason}")
        return import_library("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
