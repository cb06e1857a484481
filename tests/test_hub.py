"""Models on the Hugging Face Hub: found under their names, and a Hub that fails is one line."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from elf_rt.errors import CheckpointError
from elf_rt.export.checkpoint import load_checkpoint

GOLDEN = Path(__file__).parent / "data" / "golden"
OFFICIAL = GOLDEN / "uncond" / "checkpoint_10"
CONFIG = GOLDEN / "uncond" / "config.yml"


@pytest.mark.parametrize("name", ["org/model", "org/model/en-de", "org/model/en-de/checkpoint_10"])
def test_hub_id(tmp_path, monkeypatch, name):
    folder = tmp_path / "snapshot" / "en-de" if "en-de" in name else tmp_path / "snapshot"
    folder.mkdir(parents=True)
    shutil.copy(OFFICIAL, folder)
    shutil.copy(CONFIG, tmp_path / "snapshot")
    asked = []

    def snapshot_download(repo, allow_patterns=None):
        asked.append((repo, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    checkpoint = load_checkpoint(name)
    assert checkpoint.path == folder / "checkpoint_10" and checkpoint.config.max_length == 16
    sub = name.removeprefix("org/model").lstrip("/")
    assert asked == [("org/model", [sub, f"{sub}/*", "*.yml", "*.yaml", "*.json"] if sub else None)]


def test_hub_out_of_reach_or_unknown(monkeypatch, tmp_path):
    from httpx import Request, Response
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def answer(status):
        return Response(status, request=Request("GET", "https://hub"))

    for error, message in (
        (LocalEntryNotFoundError("offline"), "cannot be reached"),
        (HFValidationError("bad name"), "gives no such model"),
        (HfHubHTTPError("x", response=answer(403)), "gives no such model"),
        (HfHubHTTPError("429 Too Many Requests\nfor url", response=answer(429)), r"\(429 Too Many Requests\): try"),
        (OSError(28, "No space left on device"), r"cannot be downloaded .*No space left on device"),
        (TypeError("string indices must be integers"), "cannot be downloaded"),  # an answer of another server
    ):

        def snapshot_download(repo, allow_patterns=None, error=error):
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint("org/model")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_checkpoint("absent.pt")


def download_from(address, home):
    """What becomes of a download in a process that waits half a second for an answer."""
    script = (
        "import elf_rt.export.hub as hub, elf_rt.errors as errors\n"
        "hub.ANSWER_SECONDS = 0.5\n"
        "try: hub.download('org/model')\n"
        "except errors.CheckpointError as error: print(error)\n"
    )
    env = os.environ | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    return subprocess.run([sys.executable, "-P", "-c", script], env=env, capture_output=True, text=True, timeout=60)


def test_a_silent_hub_is_one_line_in_seconds(monkeypatch, tmp_path):
    """A server that takes the connection and never answers."""
    server = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{server.getsockname()[1]}"

    def accept():
        kept = []
        with contextlib.suppress(OSError):
            while True:
                kept.append(server.accept())

    threading.Thread(target=accept, daemon=True).start()
    done = download_from(address, tmp_path)
    server.close()
    assert "cannot be reached" in done.stdout and done.stdout.count("\n") == 1, done.stderr


class HalfSilent(BaseHTTPRequestHandler):
    """A Hub that knows a model, and never sends its files."""

    def do_GET(self):
        if not self.path.startswith("/api/"):
            time.sleep(60)
            return
        sha = "0" * 40
        files = [{"type": "file", "path": "model.safetensors", "size": 9, "oid": sha}]
        info = {"id": "org/model", "sha": sha, "siblings": [{"rfilename": "model.safetensors"}]}
        body = json.dumps(files if "/tree/" in self.path else info).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


def test_a_hub_whose_files_do_not_come_is_one_line(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), HalfSilent)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    done = download_from(f"http://127.0.0.1:{server.server_port}", tmp_path)
    server.shutdown()
    assert "cannot be reached or is busy" in done.stdout and done.stdout.count("\n") == 1 and not done.stderr, done
