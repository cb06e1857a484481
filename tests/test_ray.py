"""Ray Data and Ray Serve on a real local Ray of two workers, one of which is killed in mid-flight."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest

import elf_rt

ray = pytest.importorskip("ray", reason="no Ray: pip install 'elf-rt[ray]'")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own
MODEL = "spoken-to-written"
STEPS = 2
SEED = 3


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray on this machine with room for two models of one core."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture
def model(bundle) -> Iterator[elf_rt.Model]:
    with elf_rt.load(bundle("spoken-to-written"), "onnxruntime", threads=1) as model:
        yield model


@pytest.fixture
def records() -> list[dict[str, Any]]:
    """Records whose other fields have different types in different lines, which a table would not take."""
    path = Path(__file__).parents[1] / "examples" / "spoken-to-written" / "test.jsonl"
    read = [json.loads(line) for line in path.read_text().splitlines()[:24]]
    return [{"input": each["input"], "id": k if k % 2 else {"deep": [str(k), None]}} for k, each in enumerate(read)]


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL, without how long they took."""
    read = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert all(line.pop("ms") for line in read)
    return read


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def workers() -> dict[int, str]:
    """The processes of this cluster that hold a model for Ray Data, with what they do."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            pid, title = int(path.parent.name), path.read_bytes().rstrip(b"\0").decode()
            if title.startswith("ray::MapWorker") and parent(parent(pid)) == os.getpid():
                found[pid] = title
    return found


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.01)


def kill_one_of_two() -> None:
    """Kill a worker while both write, and wait for another in its place."""
    wait_for(lambda: [title.endswith(".submit") for title in workers().values()] == [True, True])
    both = workers().keys()
    os.kill(min(both), signal.SIGKILL)
    wait_for(lambda: workers().keys() - both)


def test_a_worker_that_is_killed_costs_no_text(cluster, bundle, model, records):
    """Its shards come late, and in their place all the same."""
    from elf_rt.scale.ray_data import write_shards

    texts = [elf_rt.Text(each["input"], SEED + k, params=model.params(steps=4)) for k, each in enumerate(records)]
    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill_one_of_two)
        shards = write_shards(texts, bundle("spoken-to-written"), "onnxruntime", threads=1, shard=3)
        written = [result for results in shards for result in results]
        killing.result()
    expected = model.write(texts)
    assert [(each.text, each.seed) for each in written] == [(each.text, each.seed) for each in expected]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_goes_on(cluster, bundle, run_cli, tmp_path, number):
    """On the cluster or alone: texts that are there are not written again, and half a line is."""
    count = 320
    (tmp_path / "in.jsonl").write_text("".join(f'{{"input": "{"a " * (k % 5)}la", "id": {k}}}\n' for k in range(count)))
    common = ["generate", str(bundle("t5")), "--input", "in.jsonl", "--backend", "onnxruntime", "--threads", "1"]
    common += ["--steps", "20"]
    spread = [*common, "--output", "out.jsonl", "--ray", cluster]
    command = [sys.executable, "-m", "elf_rt", *spread]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    part = tmp_path / "out.jsonl.part"
    wait_for(lambda: part.exists() and part.stat().st_size)
    running.send_signal(number)
    _, told = running.communicate(timeout=60)
    kept = part.read_text().count("\n")
    assert 0 < kept < count and not (tmp_path / "out.jsonl").exists()
    if number == signal.SIGTERM:
        assert running.returncode == 128 + number and f"stopped; {kept} of {count} texts are in {part}" in told

    part.write_text(part.read_text().replace('"text": "', '"text": "kept ') + '{"input": "a l')
    refused = run_cli(*spread)
    assert refused.code == 1 and "--resume" in refused.err
    rest = spread if number == signal.SIGKILL else spread[: spread.index("--ray")]
    assert run_cli(*rest, "--resume").code == 0
    first = lines(tmp_path / "out.jsonl")[0]["seed"]
    assert run_cli(*common, "--output", "alone.jsonl", "--seed", str(first)).code == 0
    alone = lines(tmp_path / "alone.jsonl")
    for line in alone[:kept]:
        line["text"] = f"kept {line['text']}"
    assert lines(tmp_path / "out.jsonl") == alone
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "alone.jsonl", "out.jsonl"}


def test_generate_on_a_cluster(cluster, bundle, records, run_cli, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records[:4]))
    common = ["generate", bundle("spoken-to-written"), "--input", "in.jsonl", "--steps", STEPS, "--seed", SEED]
    common += ["--backend", "onnxruntime", "--threads", 1, "-n", 2]
    alone = run_cli(*map(str, common), "--output", "alone.jsonl")
    spread = run_cli(*map(str, common), "--output", "spread.jsonl", "--ray", cluster)
    assert (alone.code, spread.code) == (0, 0), spread.err
    assert lines(tmp_path / "spread.jsonl") == lines(tmp_path / "alone.jsonl")


def test_what_elf_rt_refuses_is_one_line(cluster, bundle, records, run_cli, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records[:2]))
    common = ["generate", bundle("spoken-to-written"), "--input", "in.jsonl", "--output", "out.jsonl"]
    refused = run_cli(*common, "--ray", cluster, "--backend", "onnxruntime", "--precision", "bf16")
    assert (refused.code, "Traceback" in refused.err) == (1, False)
    told = refused.err.splitlines()[-1]  # Ray may log something before it
    assert told.startswith("error: on ") and "holds fp32, not bf16" in told
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    run_cli(*common[:4], "--ray", "local").assert_clear_error("--output")
    run_cli(*common, "--ray", "local", "--seed", str(2**64 - 1)).assert_clear_error("seed must be", "2**64 - 2")
    run_cli(*common, "--ray", "local", "--preset", "odd").assert_clear_error("preset must be")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_example(cluster, bundle, model, records, tmp_path):
    asked = [{"input": each["input"], "seed": 40 - k} for k, each in enumerate(records[:3])]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    example = Path(__file__).parents[1] / "examples" / "ray_batch.py"
    command = [sys.executable, example, bundle("spoken-to-written"), tmp_path / "in.jsonl", tmp_path / "out"]
    environment = {**os.environ, "RAY_ADDRESS": cluster, "RAY_USAGE_STATS_ENABLED": "0"}
    subprocess.run(command, env=environment, check=True, timeout=90)
    written = [json.loads(line) for path in (tmp_path / "out").iterdir() for line in path.read_text().splitlines()]
    texts = model.write([elf_rt.Text(each["input"], seed=each["seed"]) for each in asked])
    by_seed = {result.seed: result.text for result in texts}
    assert {each["seed"]: each["text"] for each in written} == by_seed


def test_serve(cluster, bundle, model, records):
    """Texts over HTTP are those of the model, also while one of the two replicas is killed."""
    from ray import serve

    from elf_rt.scale.ray_serve import Settings, app

    settings = Settings(bundle=str(bundle("spoken-to-written")), backend="onnxruntime", replicas=2, max_rows=4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(app(settings))
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            check_answers(client, model, records)
            check_a_client_that_leaves(client, records[0]["input"])
            check_killed_replica(client, model, records)
    finally:
        serve.shutdown()


def ask(client: openai.OpenAI, prompt: str, seed: int, steps: int) -> str:
    """A text. A request that a dying replica did not finish is sent again."""
    for _ in range(20):
        try:
            extra = {"steps": steps}
            answer = client.completions.create(model=MODEL, prompt=prompt, seed=seed, extra_body=extra, timeout=30)
            return answer.choices[0].text
        except (openai.InternalServerError, openai.APIConnectionError):
            time.sleep(0.5)
    raise AssertionError("no answer")


def check_answers(client: openai.OpenAI, model: elf_rt.Model, records: list[dict[str, Any]]) -> None:
    """Whole texts, drafts, and refusals."""
    prompt = records[0]["input"]
    (text,) = model.generate(prompt, seed=7, steps=6)
    drafts = [each for each in model.stream(prompt, seed=7, steps=6, drafts_every=2) if isinstance(each, elf_rt.Draft)]
    first = client.completions.create(model=MODEL, prompt=prompt, seed=7, extra_body={"steps": 6})
    assert first.choices[0].text == text.text
    assert first.choices[0].timings["predicted_ms"] > 0  # the replica was warmed up
    asked = {"model": MODEL, "prompt": prompt, "seed": 7}
    ours = {"steps": 6, "diffusing": True, "drafts_every": 2}
    *events, last = client.completions.create(**asked, stream=True, extra_body=ours)
    told = [(event.step, event.choices[0].text) for event in events]
    assert told == [(draft.step, draft.texts[0]) for draft in drafts if draft.texts]
    assert last.choices[0].text == text.text
    with pytest.raises(openai.BadRequestError, match="steps"):
        client.completions.create(**asked, extra_body={"steps": 0})


def check_a_client_that_leaves(client: openai.OpenAI, prompt: str) -> None:
    """Its text is cancelled long before its last step."""
    ours = {"steps": 10_000, "diffusing": True}
    with client.completions.create(model=MODEL, prompt=prompt, stream=True, extra_body=ours) as events:
        assert next(events).step == 1
    metrics = str(client.base_url).replace("/v1/", "/metrics")  # of one of the replicas
    for _ in range(200):
        with urllib.request.urlopen(metrics, timeout=30) as answer:
            if "elf_rt_texts_cancelled_total 1.0" in answer.read().decode():
                return
        time.sleep(0.1)
    raise AssertionError("the text goes on")


def check_killed_replica(client: openai.OpenAI, model: elf_rt.Model, records: list[dict[str, Any]]) -> None:
    """Every client gets its text, though a replica dies with texts in flight."""
    expected = model.generate([each["input"] for each in records], seed=SEED, steps=8)
    with ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(ask, client, each.prompt, each.seed, steps=8) for each in expected]
        answers[0].result()
        names = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True) if "Writer#" in each["name"]]
        assert len(names) == 2
        ray.kill(ray.get_actor(names[0], namespace="serve"))
        assert [answer.result() for answer in answers] == [each.text for each in expected]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_replica_whose_engine_has_stopped_is_replaced(model, monkeypatch):
    """Serve replaces a replica whose check fails."""
    from elf_rt.scale.ray_serve import Writer

    def fail(engine: Any) -> None:
        raise RuntimeError("broken")

    replica = Writer()
    replica.app = SimpleNamespace(state=SimpleNamespace(model=model))
    replica.check_health()
    monkeypatch.setattr(model._driver, "_admit", fail)
    for call in (lambda: model.generate("a", seed=0, steps=1), replica.check_health):
        with pytest.raises(elf_rt.BackendError, match=r"the engine stopped \(RuntimeError: broken\)"):
            call()
