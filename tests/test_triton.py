"""What ``elf-rt triton`` writes, asked through a real Triton server: the one that nvidia-pytriton carries."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import elf_rt

WHEEL = Path(__file__).parents[1] / "build" / "triton"  # nvidia-pytriton and a numpy below 2, for its Python stub
TRITON = WHEEL / "pytriton" / "tritonserver"
STUB = TRITON / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}"
PROMPTS = ["i paid twenty three dollars", "at ten past four", "it is may the third", "the nineteen eighties"]
# The Python inside Triton reads no PYTHONPATH.
PRELUDE = "import site, sys\nfor folder in {sites!r}: site.addsitedir(folder)\nsys.path.insert(0, {wheel!r})\n"


def cannot_start() -> str | None:
    """Why the server does not start here, or None."""
    if not TRITON.is_dir():
        return f"no Triton server: pip install --no-deps --target {WHEEL} nvidia-pytriton 'numpy<2'"
    if not STUB.is_dir():
        return f"nvidia-pytriton has no stub for Python {STUB.name}"
    needed = [TRITON / "bin" / "tritonserver", STUB / "triton_python_backend_stub"]
    told = [subprocess.run(["ldd", file], capture_output=True, text=True) for file in needed]
    return next(
        (line.strip() for each in told for line in (each.stdout + each.stderr).splitlines() if "not found" in line),
        None,
    )


class Server:
    """A Triton server on a free port of loopback."""

    def __init__(self, repository: Path, folder: Path) -> None:
        backend = folder / "backends" / "python"
        shutil.copytree(TRITON / "backends" / "python", backend)
        shutil.copy(STUB / "triton_python_backend_stub", backend)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}/v2", folder / "log"
        options = {
            "model-repository": repository,
            "backend-directory": backend.parent,
            "http-address": "127.0.0.1",
            "http-port": port,
            "allow-grpc": "false",
            "allow-metrics": "false",
        }
        command = [TRITON / "bin" / "tritonserver", *(f"--{name}={value}" for name, value in options.items())]
        environment = {**os.environ, "LD_LIBRARY_PATH": str(WHEEL / "nvidia_pytriton.libs")}
        with self.log.open("w") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def wait(self, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._process.poll() is None:
            try:
                self.get("/health/ready", read=False)
                return
            except OSError:
                time.sleep(0.1)
        pytest.fail(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def get(self, path: str, *, read: bool = True) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer) if read else None

    def ask(self, model: str, how: str = "generate", **inputs: Any) -> list[dict[str, Any]]:
        """The answers to one request: several where they are streamed. Raises HTTPError for a refusal."""
        request = urllib.request.Request(f"{self.url}/models/{model}/{how}", json.dumps(inputs).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            body = answer.read().decode()
        return [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line.strip()]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(60)


@pytest.fixture(scope="module", params=["spoken-to-written", "shakespeare"])
def served(request, bundle, tmp_path_factory) -> Iterator[tuple[Server, Path]]:
    """A server of a conditional or an unconditional model, and its bundle."""
    if reason := cannot_start():
        pytest.skip(reason)
    folder, source = tmp_path_factory.mktemp("triton"), bundle(request.param)
    write(source, folder / "models", "--max-batch", "4", "--backend", "onnxruntime", "--threads", "1")
    sites = [path for path in sys.path if path.endswith("site-packages")]
    for model in (folder / "models").glob("*/1/model.py"):
        model.write_text(PRELUDE.format(sites=sites, wheel=str(WHEEL)) + model.read_text())
    server = Server(folder / "models", folder)
    try:
        server.wait()
        yield server, source
    finally:
        server.close()


def write(source: Path, output: Path, *options: str) -> None:
    subprocess.run([sys.executable, "-m", "elf_rt", "triton", source, "-o", output, *options], check=True)


def test_texts_are_those_of_the_model(served):
    """Requests with different steps share Triton's batches, and each gets the text that its seed has alone."""
    server, source = served
    with elf_rt.load(source, "onnxruntime") as model:
        conditional = bool(model.config.max_input_length)
        asked = [
            {"SEED": k, "STEPS": 2 + k, **({"PROMPT": prompt} if conditional else {})}
            for k, prompt in enumerate(PROMPTS)
        ]
        texts = [elf_rt.Text(a.get("PROMPT"), seed=a["SEED"], params=model.params(steps=a["STEPS"])) for a in asked]
        expected = model.write(texts)
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = [answer for (answer,) in pool.map(lambda inputs: server.ask("elf", **inputs), asked)]
    assert [answer["TEXT"] for answer in answers] == [result.text for result in expected]
    assert [answer["IDS"] for answer in answers] == [result.ids.tolist() for result in expected]
    assert [answer["SEED"] for answer in answers] == list(range(len(asked)))
    (stats,) = server.get("/models/elf/stats")["model_stats"]
    assert any(batch["batch_size"] > 1 for batch in stats["batch_stats"])


def test_drafts(served):
    server, source = served
    with elf_rt.load(source, "onnxruntime") as model:
        prompt = PROMPTS[0] if model.config.max_input_length else None
        (expected,) = model.generate(prompt, seed=5, steps=6)
        drafts = [d for d in model.stream(prompt, seed=5, steps=6, drafts_every=2) if isinstance(d, elf_rt.Draft)]
    inputs = {"SEED": 5, "STEPS": 6, "DRAFTS_EVERY": 2, **({} if prompt is None else {"PROMPT": prompt})}
    *pieces, last = server.ask("elf_stream", "generate_stream", **inputs)
    assert [(p["STEP"], p["TEXT"]) for p in pieces] == [(d.step, d.texts[0]) for d in drafts if d.texts]
    assert all(piece["DRAFT"] for piece in pieces)
    assert (last["DRAFT"], last["STEP"], last["STEPS"], last["TEXT"]) == (False, 6, 6, expected.text)


def test_a_refusal_is_one_sentence_and_the_server_goes_on(served):
    server, _ = served
    wanted = [each["name"] for each in server.get("/models/elf/config")["input"] if not each["optional"]]
    inputs: dict[str, Any] = {"PROMPT": {"PROMPT": PROMPTS[0]}, "SEED": {"SEED": 1}}[wanted[0]]
    for model, how in (("elf", "generate"), ("elf_stream", "generate_stream")):
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.ask(model, how, **inputs, STEPS=0)
        assert refused.value.code == 400
        told = refused.value.read().decode().removeprefix("data: ")
        assert json.loads(told) == {"error": "steps must be between 1 and 10000, got 0"}
    assert server.ask("elf", **inputs, STEPS=2)


def test_triton_reads_the_configuration(served):
    server, _ = served
    batched, streamed = (server.get(f"/models/{name}/config") for name in ("elf", "elf_stream"))
    batching = batched["dynamic_batching"]
    assert batched["max_batch_size"] == 4
    assert batching["preferred_batch_size"] == [2, 4]
    assert batching["max_queue_delay_microseconds"] > 0
    assert batching["default_queue_policy"]["timeout_action"] == "REJECT"
    assert batching["default_queue_policy"]["max_queue_size"] == 128
    assert streamed["model_transaction_policy"]["decoupled"]
    assert streamed["max_batch_size"] == 0


def test_an_output_that_exists_is_left_alone(bundle, run_cli, tmp_path):
    output = tmp_path / "models"
    output.mkdir()
    run_cli("triton", bundle("spoken-to-written"), "-o", output, "--backend", "onnxruntime").assert_clear_error(
        "exists"
    )
    assert list(output.iterdir()) == []


def test_a_model_is_warm_when_triton_has_loaded_it(bundle, monkeypatch):
    """Without a server: a stand-in for the module that is there inside Triton alone."""
    backend = SimpleNamespace(TRITONSERVER_RESPONSE_COMPLETE_FINAL=1)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    monkeypatch.delitem(sys.modules, "elf_rt.scale.triton_model", raising=False)
    from elf_rt.scale.triton_model import Batched

    parameters = {"bundle": bundle("shakespeare"), "backend": "onnxruntime", "precision": "fp32"}
    parameters |= {"threads": "1", "max_queue": "4"}
    told = {"parameters": {name: {"string_value": str(value)} for name, value in parameters.items()}}
    loaded = Batched()
    loaded.initialize({"model_config": json.dumps(told)})
    try:
        assert loaded.model.stats().call_ms
    finally:
        loaded.finalize()
