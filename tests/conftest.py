"""Bundles that many tests read: exported once a run, whatever the number of test processes."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from elf_rt.device.cudart import Gpu, find_gpu

# Before anything imports torch: tiny products gain nothing from threads, which on a busy machine wait for each other a
# hundred times as long as they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")
HAS_GPU = isinstance(find_gpu(), Gpu)
if not HAS_GPU:  # before anything imports Triton
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # the interpreter's many small products are five times as fast

for name in ("SIGINT", "SIGHUP"):  # a shell's background jobs ignore them, and all that they start
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name), signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "data" / "golden"
EXAMPLES = ROOT / "examples"


def export(
    source: Path, output: Path, *, precisions: tuple[str, ...] = ("fp32",), append_eos: bool | None = True
) -> Path:
    """Export a checkpoint as the command line does, proof included."""
    from elf_rt.export.pipeline import ExportOptions, export_bundle
    from elf_rt.measure.verify import VerifyReport, verify_folder

    def prove(folder: Path, precision: str) -> VerifyReport:
        report = verify_folder(folder, backend="onnxruntime", precision=precision)
        assert report.passed, report
        return report

    export_bundle(str(source), output, ExportOptions(append_eos=append_eos, precisions=precisions), prove=prove)
    return output


@pytest.fixture(autouse=True)
def reachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the Hub: those that need one replace its download."""
    monkeypatch.setattr("elf_rt.export.hub.answers", lambda repo: True)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The float32 bundle of a golden case ("cond") or of a demo model ("spoken-to-written"); not to be changed."""
    base = tmp_path_factory.getbasetemp()  # of this process; with several, of this run is what is above it
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "elf-rt-bundles"
    shared.mkdir(exist_ok=True)

    def make(name: str) -> Path:
        source = GOLDEN / name if (GOLDEN / name).is_dir() else EXAMPLES / name
        output = shared / f"{name}.elfrt"
        with FileLock(shared / f"{name}.lock"):
            if not output.exists():
                export(source, output, append_eos=name != "shakespeare")
        return output

    return make


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., "Finished"]]:
    """Run the command line in an empty folder; what it prints and its exit code."""
    import subprocess
    import sys

    def run(*args: str | bytes | Path, cwd: Path = tmp_path, stdin: bytes | None = None) -> Finished:
        command = [sys.executable, "-m", "elf_rt", *(a if isinstance(a, bytes) else str(a) for a in args)]
        done = subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, timeout=300)
        return Finished(done.returncode, done.stdout.decode(), done.stderr.decode())

    yield run


class Finished:
    """A finished command. An error that elf-rt raises on purpose is one line on stderr and exit code 1 or 2."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def assert_clear_error(self, *words: str) -> None:
        assert self.code in (1, 2), (self.code, self.err)
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line and not line.startswith(("Usage:", "Try "))]
        assert len(lines) == 1, self.err
        for word in words:
            assert word in lines[0], lines[0]
