"""What the world does to a server: nonsense, clients that leave, signals in mid-flight, broken bundles."""

import json
import os
import random
import shutil
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pytest
from serving import SECONDS, served, served_process, wait_for

import elf_rt
from elf_rt import machine
from elf_rt.errors import BackendError
from elf_rt.serve.app import create_app
from elf_rt.serve.boundary import BODY_SECONDS, MAX_BODY
from elf_rt.serve.job import Service
from elf_rt.serve.server import Server, listen

LONG = {"prompt": "a", "steps": 10_000}


@pytest.fixture(scope="module")
def server(bundle):
    with (
        elf_rt.load(bundle("spoken-to-written"), "onnxruntime", threads=1, max_rows=4) as model,
        served(model) as server,
    ):
        yield server


def raw(server, data: bytes, *, wait: bool = True) -> bytes:
    """Bytes to the server as they are, and what it answers until it closes the connection."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=SECONDS) as connection:
        connection.sendall(data)
        if not wait:
            return b""
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


def post(body: bytes, *headers: str) -> bytes:
    head = ["POST /v1/completions HTTP/1.1", "Host: x", "Connection: close", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + body


VALUES = [None, True, -1, 0, 1e308, 10**400, "", "\x00\x1b", "\ud800", "é" * 9, [], [[]], {}, {"a": {}}, [None, 3]]
FIELDS = ["model", "prompt", "n", "seed", "stream", "suffix", "max_tokens", "preset", "steps", "sampler", "schedule",
          "guidance_scale", "sc_cfg", "gamma", "temperature", "length", "template", "drafts_every", "deadline_ms",
          "stream_options", "logprobs", "stop", "no such field"]  # fmt: skip


def malformed(draw: random.Random) -> bytes:
    """A request with something wrong in it, most of the time."""
    body = json.dumps(
        {"prompt": "a", "steps": 1, **{draw.choice(FIELDS): draw.choice(VALUES) for _ in range(2)}}
    ).encode()
    kind = draw.randrange(8)
    if kind == 0:
        body = body[: draw.randrange(len(body))]
    elif kind == 1:
        body = bytes(draw.randrange(256) for _ in range(draw.randrange(200)))
    elif kind == 2:
        body = b'{"prompt": "a", "steps": ' + draw.choice([b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"0x1"]) + b"}"
    elif kind == 3:
        body = b'{"prompt":' + b"[" * draw.choice([50, 100_000])
    elif kind == 4:
        return draw.choice(
            [b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01", b"POST /v1/completions HTTP/1.1\r\n", b"\n" * 99]
        )
    elif kind == 5:
        return post(
            body, draw.choice(["Content-Type: text/plain", "Content-Type: application/json; charset=x", "A: \x01"])
        )
    elif kind == 6:
        size = draw.choice([str(len(body) + 9), "-1", "abc", str(10**30), str(MAX_BODY + 1)])
        return post(body, "Content-Type: application/json").replace(f": {len(body)}\r".encode(), f": {size}\r".encode())
    return post(body, "Content-Type: application/json")


def survives(server, count: int) -> None:
    draw = random.Random(count)
    for _ in range(count):
        answer = raw(server, malformed(draw))
        status = int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0
        assert status == 0 or status < 500 or status == 504, answer
        assert not any(word in answer for word in (b"Traceback", b".py", b"site-packages")), answer
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "steps": 1}, timeout=SECONDS)
    assert answer.status_code == 200
    server.until(texts_running=0, texts_waiting=0)
    assert server.service.gate.open == 0


def test_malformed_requests(server):
    survives(server, 100)


@pytest.mark.slow
def test_many_malformed_requests_leave_memory_flat(server):
    survives(server, 500)
    before = machine.memory()["private"]
    survives(server, 501)
    assert machine.memory()["private"] < before + 10e6


def all_leave(server, count: int, stream: bool) -> None:
    before = server.metrics()["elf_rt_texts_abandoned_total"]
    body = json.dumps({**LONG, "stream": stream, "diffusing": stream}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    clients = [socket.create_connection((host, int(port)), timeout=SECONDS) for _ in range(count)]
    for client in clients:
        client.sendall(post(body, "Content-Type: application/json"))
    server.until(texts_running=min(count, 128), texts_waiting=max(0, count - 128))
    for client in clients:
        client.close()
    calls = server.service.model.stats().calls
    server.until(texts_running=0, texts_waiting=0, texts_abandoned_total=before + count)
    assert server.service.model.stats().calls - calls < 10_000  # of count x 10,000: they did not go on to their end
    assert server.service.gate.open == 0


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_are_cancelled(server, stream):
    all_leave(server, 20, stream)


@pytest.mark.slow
def test_as_many_clients_as_are_let_in_leave(server):
    all_leave(server, 192, True)


def test_a_slow_body_is_given_up(server, monkeypatch):
    monkeypatch.setattr("elf_rt.serve.boundary.BODY_SECONDS", 0.2)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=SECONDS) as connection:
        connection.sendall(post(b'{"prompt": "a"}', "Content-Type: application/json")[:-3])
        assert b" 408 " in connection.recv(65536)


def test_a_body_that_will_be_too_large_is_refused_at_once(server):
    head = post(b"", "Content-Type: application/json").replace(b"Content-Length: 0", b"Content-Length: 1000000000")
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=BODY_SECONDS / 2) as connection:
        connection.sendall(head)
        assert b" 413 " in connection.recv(65536)


def test_a_client_that_leaves_within_its_body_is_no_bad_request(server):
    def answered(status: int) -> float:
        return server.metrics().get(f'elf_rt_http_requests_total{{status="{status}"}}', 0)

    bad, left = answered(400), answered(499)
    raw(server, post(b'{"prompt": "a"}', "Content-Type: application/json")[:-3], wait=False)
    wait_for(lambda: answered(499) == left + 1, "499")
    assert answered(400) == bad


def test_a_deadline_that_passes_ends_the_text(server, monkeypatch):
    monkeypatch.setattr(server.service.gate, "_refuse_late", lambda *_: None)  # as if the prediction had been wrong
    for stream in (False, True):
        body = {**LONG, "deadline_ms": 200, "stream": stream}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=SECONDS)
        assert answer.status_code == (200 if stream else 504)
        assert "not written within deadline_ms 200" in answer.text
    server.until(texts_running=0)


def test_a_failed_engine_is_told_without_its_inside(bundle, caplog):
    with (
        elf_rt.load(bundle("spoken-to-written"), "onnxruntime", threads=1, max_rows=2) as model,
        served(model) as server,
    ):
        held = threading.Thread(target=lambda: answers.append(httpx.post(url, json=LONG, timeout=SECONDS)))
        answers, url = [], f"{server.url}/v1/completions"
        held.start()
        server.until(texts_running=1)
        model.close()
        held.join(SECONDS)
        assert answers[0].status_code == 500 and answers[0].json()["error"]["code"] == "internal"
        assert "closed" not in answers[0].text
        (logged,) = [record for record in caplog.records if record.levelname == "ERROR"]
        assert "closed" in vars(logged)["error"] and vars(logged)["request"] == answers[0].headers["x-request-id"]


def test_a_warm_up_that_fails_ends_the_server(bundle, monkeypatch):
    def fails(model):
        raise BackendError("no memory for a call")

    monkeypatch.setattr(elf_rt.Model, "warm_up", fails)
    with elf_rt.load(bundle("shakespeare"), "onnxruntime", threads=1) as model, listen("127.0.0.1", 0) as bound:
        service = Service(model, max_waiting=1, log_prompts=False)
        with pytest.raises(BackendError, match="no memory for a call"):
            Server(create_app(service), service.gate, model).run(sockets=[bound])


def test_a_conditional_model_without_its_encoder_is_served(bundle, tmp_path):
    folder = Path(shutil.copytree(bundle("spoken-to-written"), tmp_path / "b.elfrt"))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "encoder": None}))
    with elf_rt.load(folder, "onnxruntime", threads=1, max_rows=2) as model, served(model) as server:
        ask = partial(httpx.post, f"{server.url}/v1/completions", timeout=SECONDS)
        assert ask(json={"steps": 1}).status_code == 200
        refused = ask(json={"prompt": "a", "steps": 1})
        assert refused.status_code == 400 and "without a text encoder" in refused.text


def test_sigterm_under_load_loses_no_accepted_text(bundle):
    with served_process(bundle("spoken-to-written"), "--backend", "onnxruntime", "--max-rows", "4") as (process, url):
        body = {"prompt": "tina paid nine hundred dollars", "steps": 40}

        def ask(stream):
            return httpx.post(f"{url}/v1/completions", json={**body, "stream": stream}, timeout=SECONDS)

        def running():
            return "elf_rt_texts_running 8.0" in httpx.get(f"{url}/metrics").text

        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(ask, stream) for stream in (False, True) * 4]
            wait_for(running, "8 texts in flight")
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: httpx.get(f"{url}/ready").json()["status"] == "draining", "draining")
            late = httpx.post(f"{url}/v1/completions", json=body, timeout=SECONDS)
            assert late.status_code == 503 and late.headers["retry-after"] == "1"
            for future in asked:
                assert future.result().status_code == 200 and future.result().text.count('"stop"') == 1
        assert process.wait(SECONDS) == 0


def test_an_idle_server_ends_at_once_and_prints_no_prompt(bundle):
    with served_process(bundle("spoken-to-written"), "--backend", "onnxruntime", "--log-json") as (process, url):
        httpx.post(f"{url}/v1/completions", json={"prompt": "a secret meeting", "steps": 1}, timeout=SECONDS)
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 0
        lines = process.stderr.read().splitlines()
        (record,) = [json.loads(line) for line in lines if "/v1/completions" in line]
        assert record["status"] == 200 and len(record["request"]) == 16
        assert not any("secret" in line for line in lines)


def test_a_package_that_is_too_old_is_one_line(run_cli, bundle, tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "fastapi.py").touch()  # has no FastAPI
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "old"), prepend=os.pathsep)
    run_cli("serve", bundle("spoken-to-written")).assert_clear_error("FastAPI", "pip install 'elf-rt[serve]'")


def test_what_cannot_be_served_is_one_line(run_cli, bundle, tmp_path):
    broken = tmp_path / "broken.elfrt"
    shutil.copytree(bundle("spoken-to-written"), broken)
    (broken / "weights.bin").write_bytes(b"no weights")
    run_cli("serve", broken, "--port", "0").assert_clear_error("weights.bin", "altered")
    run_cli("serve", tmp_path / "absent.elfrt", "--port", "0").assert_clear_error("absent.elfrt")
    run_cli("serve", broken, "--api-key-file", "absent", "--port", "0").assert_clear_error("absent")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run_cli("serve", bundle("spoken-to-written"), "--port", str(port)).assert_clear_error(
            "cannot listen", str(port)
        )
    run_cli("serve", bundle("uncond"), "--port", "0").assert_clear_error("no tokenizer")
