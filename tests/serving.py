"""A real server on loopback, in a thread or in a process of its own."""

import contextlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from elf_rt.model import Model
from elf_rt.serve.app import create_app
from elf_rt.serve.job import Service
from elf_rt.serve.server import Server, listen

SECONDS = 120  # within which everything here must happen


class Served:
    """url, the service behind it, and the server, to be stopped by ``server.handle_exit``."""

    def __init__(self, url: str, service: Service, server: Server, thread: threading.Thread) -> None:
        self.url, self.service, self.server, self.thread = url, service, server, thread

    def metrics(self) -> dict[str, float]:
        lines = [
            line
            for line in httpx.get(f"{self.url}/metrics", timeout=SECONDS).text.splitlines()
            if not line.startswith("#")
        ]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def until(self, **wanted: float) -> None:
        """Wait for metrics to have these values."""
        wait_for(lambda: {name: self.metrics()[f"elf_rt_{name}"] for name in wanted} == wanted, str(wanted))


def wait_for(happened: Any, what: str) -> None:
    end = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < end, f"not within {SECONDS} s: {what}"
        time.sleep(0.02)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=SECONDS).status_code == 200
    except httpx.ConnectError:  # it does not listen yet
        return False


@contextlib.contextmanager
def served(model: Model, max_waiting: int = 64, **options: Any) -> Iterator[Served]:
    """The server in a thread, when it is ready."""
    service = Service(model, max_waiting=max_waiting, log_prompts=False)
    with listen("127.0.0.1", 0) as bound:
        server = Server(create_app(service, **options), service.gate, model)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        try:
            wait_for(lambda: is_ready(url), "ready")
            yield Served(url, service, server, thread)
        finally:
            server.should_exit = server.force_exit = True
            thread.join(SECONDS)
            assert not thread.is_alive()


@contextlib.contextmanager
def served_process(bundle: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``elf-rt serve`` as a user starts it, when it is ready."""
    command = [sys.executable, "-m", "elf_rt", "serve", str(bundle), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        url = ""
        while not url:
            line = process.stderr.readline()
            assert line, "it ended before it listened"
            found = re.search(r"http://[\d.:]+", line)
            url = found[0] if found else ""
        wait_for(lambda: is_ready(url), "ready")
        yield process, url
    finally:
        process.kill()
        process.communicate(timeout=SECONDS)
