"""TensorRT without TensorRT: a module with exactly the names of one real version, over ONNX Runtime.

``data/tensorrt_api.json`` holds what ``dir()`` says of the classes in the real bindings of TensorRT 10.3.0 (JetPack 6),
10.16.1.11 and 11.4.0.106, and of TensorRT-RTX 1.7.1.116, so code that touches a name which that version does not have
fails here as it would there. The fake also insists on the order of calls: profile, shapes, scratch memory and addresses
before an enqueue, and never stream 0.
"""

import enum
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fake_cuda import FakeCuda
from fake_trt_build import add_builder
from fake_trt_run import add_runtime

API: dict[str, dict[str, str]] = json.loads(
    (Path(__file__).parent / "data" / "tensorrt_api.json").read_text(encoding="utf-8")
)
ENUMERATIONS = (
    "BuilderFlag",
    "ComputeCapability",
    "DataType",
    "DynamicShapesKernelSpecializationStrategy",
    "ExecutionContextAllocationStrategy",
    "LayerType",
    "NetworkDefinitionCreationFlag",
    "ProfilingVerbosity",
    "TensorIOMode",
)


@dataclass(frozen=True)
class Making:
    """A module that is being made. ``strict`` decorates a class: only the names that the real one has exist."""

    trt: Any
    version: str
    is_rtx: bool
    api: dict[str, frozenset[str]]
    strict: Callable[[type], type]
    cuda: FakeCuda


def install_tensorrt(monkeypatch: pytest.MonkeyPatch, version: str, cuda: FakeCuda) -> Any:
    """Put a fake of one version, "11.4.0.106" or "rtx 1.7.1.116", where ``import`` finds it."""
    fake = make_tensorrt(version, cuda)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx" if version.startswith("rtx") else "tensorrt", fake)
    return fake


def make_tensorrt(version: str, cuda: FakeCuda) -> Any:
    api = {name: frozenset(names.split()) for name, names in API[version].items()}
    is_rtx = version.startswith("rtx ")
    version = version.removeprefix("rtx ")
    trt: Any = ModuleType("tensorrt_rtx" if is_rtx else "tensorrt")
    trt.__version__ = version

    def strict(cls: type) -> type:
        known = api[cls.__name__]

        def check(name: str) -> None:
            if not name.startswith("_") and name not in known:
                raise AttributeError(f"{cls.__name__} of TensorRT {version} has no {name}")

        def get(self: Any, name: str) -> Any:
            check(name)
            return object.__getattribute__(self, name)

        def put(self: Any, name: str, value: Any) -> None:
            check(name)
            object.__setattr__(self, name, value)

        cls.__getattribute__ = get  # type: ignore[method-assign, assignment]
        cls.__setattr__ = put  # type: ignore[method-assign, assignment]
        if cls.__name__ in api["module"]:
            setattr(trt, cls.__name__, cls)
        return cls

    for name in ENUMERATIONS:
        if name in api["module"]:
            setattr(
                trt, name, enum.IntEnum(name, [member for member in sorted(api[name]) if member.isupper()], start=0)
            )

    class ILogger:
        Severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    class IProgressMonitor: ...

    trt.ILogger, trt.IProgressMonitor = ILogger, IProgressMonitor
    making = Making(trt, version, is_rtx, api, strict, cuda)
    add_builder(making)
    add_runtime(making)
    return trt
