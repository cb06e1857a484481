"""The command line as a new user meets it; every bad input is one clear line and loses nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import onnx
import pyte
import pytest

from elf_rt.cli import COMMANDS

EXAMPLES = Path(__file__).parents[1] / "examples"
GOLDEN = Path(__file__).parent / "data" / "golden"
SPOKEN = "the meeting starts at quarter past three"


@pytest.fixture
def spoken(bundle, tmp_path):
    """The only bundle in the folder where commands run."""
    folder = tmp_path / "spoken.elfrt"
    shutil.copytree(bundle("spoken-to-written"), folder)
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(run_cli, name):
    done = run_cli(name, "--help")
    assert done.code == 0 and done.out.startswith("Usage:")
    assert "[default:" in done.out or name in ("doctor", "info")


def test_every_command_can_be_quiet_or_tell_more(run_cli, spoken):
    for name in COMMANDS:
        assert "--quiet" in run_cli(name, "--help").out
    args = ["generate", "--prompt", SPOKEN, "--steps", "1", "--seed", "0"]
    loud, quiet = run_cli(*args, "--length", "60"), run_cli(*args, "--length", "60", "-q")
    assert loud.out == quiet.out and "warning: " in loud.err and "seed 0" in loud.err and quiet.err == ""
    failed = run_cli("verify", "missing", "-q")
    failed.assert_clear_error("no bundle at missing")
    told = run_cli("verify", "missing", "-v").err
    assert told.startswith("Traceback") and told.endswith(failed.err) and "BundleError" in told


def test_exit_codes_are_in_the_help(run_cli):
    told = " ".join(run_cli("--help").out.split())
    assert "Exit codes: 0, done. 1, it failed, and one line tells why" in told and "128 + N" in told


def test_help_loads_nothing():
    """So that it is quick: neither an engine library nor numpy."""
    code = (
        "import sys; from elf_rt.cli import main\ntry: main(['--help'])\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and all(name in done.stdout for name in COMMANDS)
    assert not set(done.stderr.split()) & {"numpy", "rich", "tokenizers", "onnxruntime", "openvino", "torch", "onnx"}


def test_export_names_the_bundle_after_the_checkpoint(run_cli, tmp_path):
    source = tmp_path / "checkpoint_10"
    shutil.copy(GOLDEN / "uncond" / "checkpoint_10", source)
    shutil.copy(GOLDEN / "uncond" / "config.yml", tmp_path)
    done = run_cli("export", source, "--precision", "fp32")
    assert (done.code, done.out.strip()) == (0, "checkpoint_10.elfrt"), done.err
    assert "proven: latent error" in done.err and "no tokenizer.json found" in done.err
    assert run_cli("verify").code == 0
    manifest = json.loads((tmp_path / "checkpoint_10.elfrt" / "manifest.json").read_text(encoding="utf-8"))
    assert json.loads(run_cli("info", "--json").out) == manifest
    model = manifest["model"]
    assert f"width {model['hidden_size']}, {model['num_heads']} heads of {model['head_dim']}" in run_cli("info").out


def test_older_engines_get_older_operators(run_cli, tmp_path):
    """As TensorRT 10.3 needs them; here ONNX Runtime proves the graphs and TensorRT-RTX builds them."""
    done = run_cli("export", GOLDEN / "uncond", "-o", "old.elfrt", "--precision", "fp16,int8", "--opset", "20")
    assert done.code == 0, done.err
    for graph in (tmp_path / "old.elfrt").rglob("*.onnx"):
        model = onnx.load(graph, load_external_data=False)
        assert {o.domain: o.version for o in model.opset_import}[""] == 20
        assert not {node.op_type for node in model.graph.node} & {"Attention", "RMSNormalization", "RotaryEmbedding"}
    built = run_cli("build-engine", "old.elfrt", "--fp16", "--target", "tensorrt-rtx", "--sm", "89")
    assert built.code == 0, built.err


def test_generate_alone(run_cli, spoken):
    done = run_cli("generate", "--prompt", SPOKEN, "--steps", "4", "--seed", "0")
    assert done.code == 0, done.err
    again = run_cli("generate", "--prompt", SPOKEN, "--steps", "4", "--seed", "0", "--json")
    record = json.loads(again.out)
    assert record["text"] == done.out.strip() and record["seed"] == 0 and record["input"] == SPOKEN
    told = run_cli("generate", "--prompt", SPOKEN, "--steps", "4")
    assert "seed " in told.err


def test_jsonl_in_and_out(run_cli, spoken, tmp_path):
    lines = (EXAMPLES / "spoken-to-written" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    sources = [{**json.loads(line), "id": f"a\u2028{k}"} for k, line in enumerate(lines)]  # U+2028 may stand in JSON
    written = "\r\n".join(json.dumps(source, ensure_ascii=False) for source in sources)
    (tmp_path / "in.jsonl").write_bytes(written.encode())
    done = run_cli("generate", "--input", "in.jsonl", "--output", "out.jsonl", "--steps", "4", "--seed", "0", "-n", "2")
    assert done.code == 0, done.err
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").strip().split("\n")]
    for field in ("input", "output", "id"):
        assert [r[field] for r in records] == [s[field] for s in sources for _ in range(2)]
    piped = run_cli("generate", "--input", "-", "--steps", "4", "--seed", "0", stdin=lines[0].encode())
    assert piped.out.strip() == records[0]["text"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe", ("not UTF-8",)),
        (b"", ("no line in it",)),
        (b"plain text\n", ("line 1", "JSON")),
        (b'{"input": "a"}\n{"text": "b"}\n', ("line 2",)),
        (b'{"input": 3}\n', ("line 1",)),
        (b'{"input": "a"}\n\n{"input": " "}\n', ("line 3 has an empty input",)),
        (b'{"input": "a", "id": "\\ud800"}\n', ("line 1 holds half of a surrogate pair",)),
        (b'{"input": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ("line 1 is nested more than 100 deep",)),
        (b'{"input": "a", "x": ' + b'{"a":' * 500 + b"1" + b"}" * 500 + b"}", ("line 1 is nested more than 100",)),
        (b'{"input": "a"}\n{"input": "a", "x": NaN}', ("line 2 holds NaN, which is not JSON",)),
        (b'{"input": "a", "x": [-Infinity]}', ("line 1 holds -Infinity, which is not JSON",)),
        (b'{"input": "a", "x": 1e999}', ("line 1 holds a number that is too large",)),
        (b'{"input": "a", "x": ' + b"9" * 5000 + b"}", ("line 1 is not a JSON object",)),
    ],
)
def test_bad_jsonl(run_cli, spoken, tmp_path, content, words):
    (tmp_path / "in.jsonl").write_bytes(content)
    (tmp_path / "out.jsonl").write_text("kept")
    run_cli("generate", "--input", "in.jsonl", "--output", "out.jsonl").assert_clear_error(*words)
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == "kept"


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_a_file_without_end(run_cli, spoken):
    run_cli("generate", "--input", "/dev/zero").assert_clear_error("/dev/zero line 1 is longer than 64 MB")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], ("steps must be between 1 and",)),
        (["--steps", "-4"], ("steps must be between 1 and",)),
        (["--steps", "many"], ("--steps",)),
        (["--sampler", "euler"], ("euler",)),
        (["--guidance-scale", "nan"], ("guidance_scale must be",)),
        (["--preset", "best"], ("preset must be one of default",)),
        (["--prompt", ""], ("no token",)),
        (["--prompt", b"caf\xe9"], ("prompt 1 is not a text in UTF-8",)),
        (["--precision", "fp64"], ("not one of 'auto', 'fp32'",)),
        (["--input", "missing.jsonl"], ("missing.jsonl",)),
        (["--output", "a-folder"], ("a-folder is a folder",)),
        (["--output", "no/where.jsonl"], ("does not exist",)),
        (["--threads", "0"], ("--threads",)),
        (["--threads", "999999999999"], ("threads must be a whole number between 1 and", "cores), got 999999999999")),
        (["--backend", "jax"], ("not one of 'auto'",)),
        (["other.elfrt"], ("no bundle at other.elfrt",)),
        (["a-folder"], ("not a bundle",)),
    ],
)
def test_bad_generate_arguments(run_cli, spoken, tmp_path, arguments, words):
    (tmp_path / "a-folder").mkdir()
    run_cli("generate", *arguments).assert_clear_error(*words)


def test_no_bundle_or_several(run_cli, tmp_path, bundle):
    run_cli("generate").assert_clear_error("elf-rt export")
    for name in ("a.elfrt", "b.elfrt"):
        shutil.copytree(bundle("uncond"), tmp_path / name)
    run_cli("generate").assert_clear_error("several bundles", "a.elfrt, b.elfrt")


@pytest.mark.parametrize(
    ("name", "content"),
    [("notes.txt", b"hello"), ("empty.pt", b""), ("cut", None), ("missing.pt", False)],
)
def test_bad_checkpoints(run_cli, tmp_path, name, content):
    if content is None:
        content = (GOLDEN / "uncond" / "checkpoint_10").read_bytes()[:5000]
    if content is not False:
        (tmp_path / name).write_bytes(content)
    run_cli("export", name).assert_clear_error(name)
    assert not list(tmp_path.glob("*.elfrt")) and not list(tmp_path.glob(".*"))


def test_export_over_something_else_is_refused(run_cli, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("dear")
    run_cli("export", GOLDEN / "uncond", "-o", "thesis").assert_clear_error("thesis exists and is not a bundle")
    assert (tmp_path / "thesis" / "chapter.txt").read_text(encoding="utf-8") == "dear"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into a process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["importing", "writing"])
def test_interrupted_export_leaves_nothing(tmp_path, moment, number):
    command = [sys.executable, "-m", "elf_rt", "export", str(EXAMPLES / "shakespeare")]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{running.pid}/maps")
    while not ("libtorch" in maps.read_text() if moment == "importing" else list(tmp_path.glob(".*.elfrt*"))):
        assert running.poll() is None, running.communicate()
    running.send_signal(number)
    _, err = running.communicate(timeout=100)
    assert (running.returncode, err) == (128 + number, "stopped\n")
    assert not list(tmp_path.iterdir())


def test_interrupted_before_anything_is_set_up(tmp_path):
    (tmp_path / "click.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    command, env = [sys.executable, "-m", "elf_rt", "info"], {**os.environ, "PYTHONPATH": str(tmp_path)}
    running = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout is not None and running.stdout.readline() == "importing\n"
    running.send_signal(signal.SIGINT)
    assert running.communicate(timeout=30)[1] == "" and running.returncode == -signal.SIGINT


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk(spoken, tmp_path):
    command = [sys.executable, "-m", "elf_rt", "generate", "--prompt", SPOKEN, "--steps", "1", "--seed", "0"]
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "No space left" in done.stderr and "Traceback" not in done.stderr


def test_watch_is_silent_without_a_terminal(run_cli, spoken):
    done = run_cli("generate", "--prompt", SPOKEN, "--steps", "4", "--seed", "0", "--watch")
    assert done.code == 0 and len(done.out.splitlines()) == 1


def test_a_terminal_without_the_character_shows_another(run_cli, spoken, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = run_cli("generate", "--prompt", "tina paid nine pounds", "--seed", "0", "--steps", "4", "-n", "8")
    assert done.code == 0, done.err
    assert "?9" in done.out


@pytest.mark.parametrize("watch", [True, False])
def test_a_terminal_keeps_the_results(spoken, tmp_path, watch):
    """In a real (pseudo-)terminal drafts or a bar appear, and in the end nothing but the texts and one note is left."""
    prompts = ["--prompt", SPOKEN, "--prompt", "sam ran two meters"]
    arguments = [*prompts, "-n", "2", "--steps", "6", "--seed", "0", "--backend", "onnxruntime"]
    command = [sys.executable, "-m", "elf_rt", "generate", *arguments]
    plain = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    shown = in_terminal([*command, "--watch"] if watch else command, tmp_path)
    assert (b"of 6, t =" if watch else b"writing 4 texts") in shown
    screen = pyte.Screen(100, 30)
    pyte.ByteStream(screen).feed(shown)
    lines = [line.strip() for line in screen.display if line.strip()]
    assert lines[:-1:2] == [SPOKEN, SPOKEN, "sam ran two meters", "sam ran two meters"]
    assert lines[1:-1:2] == plain.stdout.splitlines()
    assert lines[-1].startswith("seed 0, 6 steps, onnxruntime fp32, as asked")


def in_terminal(command: list[str], folder: Path) -> bytes:
    """All that a command writes to a terminal of 100 columns and 30 lines."""
    pty = pytest.importorskip("pty")
    primary, secondary = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    running = subprocess.Popen(command, cwd=folder, stdout=secondary, stderr=secondary, env=environment)
    os.close(secondary)
    shown = b""
    while True:
        try:
            part = os.read(primary, 4096)
        except OSError:
            break
        if not part:
            break
        shown += part
    running.wait(timeout=60)
    os.close(primary)
    assert running.returncode == 0
    return shown


def test_verify_fails_on_other_text(run_cli, spoken, tmp_path, bundle):
    assert run_cli("verify", "--json").code == 0
    run_cli("verify", "--replay", EXAMPLES / "shakespeare" / "config.yml").assert_clear_error(
        "is no .npz file of arrays"
    )
    run_cli("verify", "--replay", bundle("uncond") / "replay.npz").assert_clear_error("another model")


def test_altered_bundle(run_cli, spoken):
    with (spoken / "weights.bin").open("r+b") as file:
        file.seek(4096)
        file.write(b"\0\0\1")
    run_cli("generate", "--prompt", SPOKEN).assert_clear_error("weights.bin was altered")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_manifest_of_other_sizes(run_cli, spoken, backend):
    path = spoken / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["model"]["hidden_size"] += 64
    path.write_text(json.dumps(manifest))
    done = run_cli("generate", "--prompt", SPOKEN, "--backend", backend)
    done.assert_clear_error("denoiser.onnx is no denoiser of the model in manifest.json (see its hidden)")


def test_presets_that_go_are_told(run_cli, tmp_path):
    source = tmp_path / "checkpoint_10"
    shutil.copy(GOLDEN / "uncond" / "checkpoint_10", source)
    shutil.copy(GOLDEN / "uncond" / "config.yml", tmp_path)
    (tmp_path / "presets.json").write_text('{"fast": {"steps": 2}}')
    args = ["export", source, "--precision", "fp32", "--presets"]
    assert run_cli(*args, "presets.json").code == 0
    (tmp_path / "half.json").write_text('{"\\ud800": {"steps": 2}}')
    run_cli(*args, "half.json").assert_clear_error("half.json is not JSON", "surrogates")
    os.mkfifo(tmp_path / "pipe")  # nobody writes into it
    run_cli(*args, "pipe").assert_clear_error("is no file, but a folder, a pipe or a device")
    again = run_cli("export", source, "--precision", "fp32")
    assert again.code == 0 and "had presets that this one has not: fast" in again.err


def test_doctor(run_cli):
    done = run_cli("doctor")
    assert done.code == 0 and "ok  onnxruntime" in done.out and "tensorrt" in done.out
