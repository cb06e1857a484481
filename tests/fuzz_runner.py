"""Runs the command line on one bad input, in a child of `fuzz_server` that is watched from outside.

What must not happen whatever the input was (`Ended.fault`) is judged here; the right text, by the caller.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SECONDS = 20  # of processor time, so that a busy machine is not called a hang
PATIENCE = 100  # seconds without an end, whatever was computed
BYTES = 1_000_000_000


@dataclass
class Ended:
    """How a command ended. left: what it made, below its folder and (tmp/) in the temporary one."""

    code: int
    out: str
    err: str
    stopped: str = ""  # why the watch killed it
    left: list[str] = field(default_factory=list)

    def fault(self, allowed: Sequence[str] = ()) -> str | None:
        """What is wrong with it, whatever its input was. allowed: what it may leave when all went well."""
        if self.stopped:
            return self.stopped
        if "Traceback" in self.err:
            return f"traceback: {self.err.strip().splitlines()[-1][:200]}"
        if self.code not in (0, 1, 2):
            return f"exit code {self.code}: {self.err[-200:]}"
        lines = [x for x in self.err.splitlines() if x.strip() and not x.startswith(("Usage: ", "Try ", "warning: "))]
        if self.code and len(lines) != 1:
            return f"{len(lines)} lines instead of one: {self.err[-300:]!r}"
        if surplus := [name for name in self.left if self.code or name.split("/")[0] not in allowed]:
            return f"left behind: {', '.join(surplus)}"
        return None


class Runner:
    """One server. Not for several threads."""

    def __init__(self) -> None:
        server = Path(__file__).with_name("fuzz_server.py")
        # -P: the installed elf_rt, not the source tree in the working folder.
        command = [sys.executable, "-P", str(server)]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, args: Sequence[str], folder: Path, env: Mapping[str, str | None] | None = None) -> Ended:
        """``elf-rt *args`` in ``folder``, under the limits. env: variables to set, or (None) to take away."""
        assert self._server.stdin is not None
        scratch = folder.parent / f"{folder.name}.scratch"
        (scratch / "tmp").mkdir(parents=True)
        streams = [scratch / "out", scratch / "err"]
        before = _listing(folder)
        env = {"TMPDIR": str(scratch / "tmp"), **(env or {})}
        request = {"args": list(args), "folder": str(folder), "streams": list(map(str, streams)), "env": env}
        print(json.dumps(request), file=self._server.stdin, flush=True)
        watch = _Watch(int(self._answer()))
        code = int(self._answer())
        watch.stop()
        out, err = (path.read_bytes().decode(errors="replace") for path in streams)
        left = [*(_listing(folder) - before), *(f"tmp/{name}" for name in _listing(scratch / "tmp"))]
        shutil.rmtree(scratch)
        return Ended(code, out, err, watch.why, sorted(left))

    def _answer(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline()

    def close(self) -> None:
        self._server.communicate()


class _Watch(threading.Thread):
    """Kills a process that goes beyond the limits; ``why`` says which."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.why = ""
        self._pid, self._begun = pid, time.monotonic()
        self._ended = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._ended.wait(0.05) and not self.why:
            if (used := _resident(self._pid)) > BYTES:
                self.why = f"uses {used / 1e9:.1f} GB"
            elif _cpu_seconds(self._pid) > SECONDS or time.monotonic() - self._begun > PATIENCE:
                self.why = "hangs"
        if self.why:
            os.kill(self._pid, signal.SIGKILL)

    def stop(self) -> None:
        self._ended.set()
        self.join()


def _resident(pid: int) -> int:
    """Bytes; 0 of a process that is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _cpu_seconds(pid: int) -> float:
    """User and system time of all threads; 0 of a process that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _listing(folder: Path) -> set[str]:
    """All that is in a folder."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}
