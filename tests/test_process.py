"""The process around a command: streams that are closed or full, signals, users without a home, containers' shares."""

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from elf_rt import machine
from elf_rt.bundle import Bundle

ELF_RT = [sys.executable, "-m", "elf_rt"]
ONE = ["--prompt", "a la", "--steps", "1", "--seed", "0", "--backend", "onnxruntime"]


@pytest.fixture
def shell(bundle, tmp_path):
    """Run `elf-rt generate` for one text, with what a shell does to its streams; exit code, stdout, stderr."""

    def run(redirection: str, *more: str, before: str = ""):
        command = " ".join([before, *ELF_RT, "generate", str(bundle("t5")), *(f"'{a}'" for a in ONE), *more])
        script = f"{command} {redirection}; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout, done.stderr

    return run


def test_streams_that_do_not_matter(shell):
    """A text is written to a good standard output, whatever the others are."""
    code, text, told = shell("")
    assert (code, told.count("\n")) == (0, 1) and text.endswith("\n")
    for redirection in ("2>&-", "2>/dev/full", "<&-", "2>&- <&-"):
        assert shell(redirection)[:2] == (0, text), redirection


@pytest.mark.parametrize(
    ("redirection", "reason"),
    [(">&-", "standard output is closed"), (">/dev/full", "No space left on device"), (">&- <&-", "is closed")],
)
def test_a_standard_output_that_takes_nothing(shell, redirection, reason):
    code, out, err = shell(redirection)
    assert (code, out, err.count("\n")) == (1, "", 1) and reason in err
    assert shell(f"{redirection} 2>&-")[0] == 1


def test_a_reader_that_has_gone(shell):
    code, _, err = shell("| true", "-n", "50")
    assert code in (0, 1) and err in ("", err) and "Traceback" not in err and "Exception ignored" not in err


def test_help_and_usage_need_no_good_stream(tmp_path):
    for line in ("--help >/dev/full", "--help >&-", "generate --steps many 2>/dev/full", "doctor >&-"):
        done = subprocess.run(
            f"{sys.executable} -m elf_rt {line}", shell=True, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode in (1, 2) and "Traceback" not in done.stderr, line
        assert "Exception ignored" not in done.stderr


def test_a_file_does_not_get_the_number_of_a_closed_stream(shell, tmp_path):
    code, _, _ = shell(">&- 2>&-", "--output", "out.jsonl")
    assert code == 0
    (line,) = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["seed"] == 0


PROMPT = "Ω costs €5 😀"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-16", "latin-1:strict"])
def test_json_is_utf8_under_every_code_page(bundle, tmp_path, encoding):
    command = [*ELF_RT, "generate", str(bundle("t5")), "--prompt", PROMPT, "--steps", "1", "--json"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding}, check=True
    )
    assert json.loads(done.stdout.decode("utf-8"))["input"] == PROMPT


def test_redirected_text_is_utf8(tmp_path):
    """What the locale cannot show is lost on a terminal at most: it is what would be read from the file later."""
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    env.pop("PYTHONIOENCODING", None)
    code = "from elf_rt.console import open_streams; open_streams(); print('\\u20ac')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, check=True)
    assert done.stdout.decode("utf-8").strip() == "€"


# A user without a home

HOMELESS = """
import os, pwd, sys
os.environ.pop("HOME", None)
def unknown(uid): raise KeyError(uid)
pwd.getpwuid = unknown
from elf_rt.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_user_without_a_home(bundle, tmp_path, backend):
    """As in `docker run --user 12345`."""
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    env.pop("XDG_CACHE_HOME", None)
    command = [sys.executable, "-c", HOMELESS, "generate", str(bundle("t5")), *ONE[:-1], backend]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 1), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_cache_that_is_named_is_used(monkeypatch, tmp_path):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    assert not machine.user_cache().exists()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.user_cache() == tmp_path / "elf-rt"


# Containers


def control_groups(root: Path, lines: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": lines, **{f"sys/fs/cgroup/{n}": t for n, t in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


V1 = "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n"


@pytest.mark.parametrize(
    ("lines", "files", "cpus"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),  # docker run --cpus 1.5
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, 2.0),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000\n", "a/cpu.max": "200000 100000\n"}, 0.5),
        ("0::/not/mounted\n", {"cpu.max": "300000 100000\n"}, 3.0),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 2.5),
        (V1, {"cpu/docker/abc/cpu.cfs_quota_us": "-1\n", "cpu/docker/abc/cpu.cfs_period_us": "100000\n"}, None),
        (V1, {"cpu/docker/abc/cpu.cfs_quota_us": "1000\n", "cpu/docker/abc/cpu.cfs_period_us": "100000\n"}, 0.01),
        ("0::/\n" + V1, {"cpu.max": "odd\n"}, None),
        ("0::/\n", {}, None),
    ],
)
def test_the_share_of_processor_time(tmp_path, lines, files, cpus):
    assert machine.cgroup_cpus(control_groups(tmp_path, lines, files)) == cpus


def test_no_control_groups(tmp_path):
    assert machine.cgroup_cpus(tmp_path) is None


@pytest.mark.parametrize(("share", "cores"), [(None, 16), (1.0, 1), (0.25, 1), (2.5, 3), (64.0, 16)])
def test_cores_within_the_share(monkeypatch, share, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(machine, "cgroup_cpus", lambda: share)
    assert machine.cores() == cores


# Signals, and runs that are stopped


def long_run(folder: Path, count: int) -> None:
    lines = [json.dumps({"input": "a " * (k % 5) + "la", "id": k}) for k in range(count)]
    (folder / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")


def start(bundle: Path, folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [*ELF_RT, "generate", str(bundle), "--input", "in.jsonl", "--output", "out.jsonl", "--seed", "7"]
    command += ["--backend", "onnxruntime", "--steps", "2", *more]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)


def records(path: Path) -> list[dict]:
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for record in found:
        record.pop("ms")
    return found


def wait_for(condition, running: subprocess.Popen[str]) -> None:
    while not condition():
        assert running.poll() is None, running.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_keeps_its_texts(bundle, tmp_path, number):
    """And --resume writes the rest: the same file as of a run that was not stopped."""
    count = 3000
    long_run(tmp_path, count)
    part = tmp_path / "out.jsonl.part"
    running = start(bundle("t5"), tmp_path)
    wait_for(lambda: part.exists() and part.stat().st_size > 2000, running)
    running.send_signal(number)
    _, err = running.communicate(timeout=60)
    kept = records(part)
    assert running.returncode == 128 + number and err.count("\n") == 1
    assert f"stopped; {len(kept)} of {count} texts are in {part}" in err and "--resume" in err
    assert 0 < len(kept) < count and not (tmp_path / "out.jsonl").exists()

    refused = start(bundle("t5"), tmp_path)
    assert "holds texts of a run that was stopped" in refused.communicate()[1] and refused.returncode == 1
    assert records(part) == kept

    other = start(bundle("t5"), tmp_path, "--resume", "--steps", "3")
    assert "of a run with steps 2" in other.communicate()[1] and other.returncode == 1
    assert records(part) == kept

    long_run(tmp_path, len(kept) + 5)
    with part.open("a") as file:  # a power cut, in the middle of a line
        file.write('{"input": "a l')
    running = start(bundle("t5"), tmp_path, "--resume")
    assert running.communicate()[1].startswith("seed 7, 2 steps") and running.returncode == 0
    resumed = records(tmp_path / "out.jsonl")
    assert [r["id"] for r in resumed] == list(range(len(kept) + 5)) and resumed[: len(kept)] == kept
    assert [r["seed"] for r in resumed] == list(range(7, 7 + len(kept) + 5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_resumed_run_is_the_run(run_cli, bundle, tmp_path):
    """Texts of each prompt stay together, an unnamed seed is that of the first run, and another run is refused."""
    long_run(tmp_path, 4)
    args = ["generate", bundle("t5"), "--input", "in.jsonl", "--output", "out.jsonl", "--steps", "2", "-n", "3"]
    args += ["--backend", "onnxruntime"]
    assert run_cli(*args, "--seed", "11").code == 0
    whole = (tmp_path / "out.jsonl").read_bytes()
    lines = whole.split(b"\n")
    part = tmp_path / "out.jsonl.part"
    for done in (0, 1, 5, 6, 12):
        part.write_bytes(b"".join(line + b"\n" for line in lines[:done]))
        first = ["--seed", "11"] if done < 3 else []
        assert run_cli(*args, *first, "--resume").code == 0
        assert records(tmp_path / "out.jsonl") == [
            {k: v for k, v in json.loads(line).items() if k != "ms"} for line in lines[:12]
        ]
    part.write_bytes(b"\n".join(lines[:6]).replace(b'"id": 1', b'"id": 9') + b"\n")
    run_cli(*args, "--resume").assert_clear_error("of another run (line 4)")
    for other in (["--seed", "12"], ["-n", "2"]):
        part.write_bytes(b"\n".join(lines[:6]) + b"\n")
        run_cli(*args, "--resume", *other).assert_clear_error("of another run")
    for strange in ("what is this\n", "[" * 100_000 + "\n", '{"input": "a", "seed": true}\n'):
        part.write_text(strange)
        run_cli(*args, "--resume").assert_clear_error("not what a stopped run leaves")
    run_cli("generate", bundle("t5"), "--resume").assert_clear_error("--resume goes on with the file of --output")


def raise_as_libraries_do():
    try:
        raise ImportError("libtorch_cpu.so: failed to map segment from shared object")
    except ImportError as error:
        raise SystemError("initialization failed") from error


@pytest.mark.parametrize("fail", [lambda: bytes(10**18), raise_as_libraries_do])
def test_a_run_that_fails_keeps_its_texts(bundle, tmp_path, monkeypatch, capsys, fail):
    from elf_rt import cli, model

    long_run(tmp_path, 40)
    monkeypatch.chdir(tmp_path)
    whole = model.Model.stream

    def stream(self, *args, **options):
        yield from list(whole(self, *args, **options))[:5]
        fail()

    monkeypatch.setattr(model.Model, "stream", stream)
    args = ["generate", str(bundle("t5")), "--input", "in.jsonl", "--output", "out.jsonl", "--steps", "1"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*args, "--backend", "onnxruntime"])
    kept = len((tmp_path / "out.jsonl.part").read_text().splitlines())
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and "memory ran out" in line and f"{kept} of 40 texts" in line


def test_an_output_keeps_its_mode_and_its_link(run_cli, bundle, tmp_path):
    (tmp_path / "real.jsonl").write_text("old")
    (tmp_path / "real.jsonl").chmod(0o640)
    (tmp_path / "out.jsonl").symlink_to("real.jsonl")
    assert run_cli("generate", bundle("t5"), *ONE, "--output", "out.jsonl").code == 0
    assert (tmp_path / "out.jsonl").is_symlink() and len(records(tmp_path / "real.jsonl")) == 1
    assert (tmp_path / "real.jsonl").stat().st_mode & 0o777 == 0o640
    assert {p.name for p in tmp_path.iterdir()} == {"out.jsonl", "real.jsonl"}


def test_nohup_is_respected(bundle, tmp_path):
    """A signal that was ignored before stays ignored."""
    long_run(tmp_path, 20)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        running = start(bundle("t5"), tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    while running.poll() is None:
        running.send_signal(signal.SIGHUP)
        time.sleep(0.05)
    assert running.returncode == 0 and len(records(tmp_path / "out.jsonl")) == 20


ONE_THREAD = """
import os, sys, time
import numpy as np
import elf_rt
from elf_rt.sampling import integrator
from elf_rt.sampling.noise import NoiseKey
tasks = lambda: len(os.listdir("/proc/self/task"))
before = tasks()
with elf_rt.load(sys.argv[1], "onnxruntime", threads=int(sys.argv[2])) as model:
    model.generate("a la", n=4, seed=0, steps=1)
    z, coef = np.zeros((4096, 64), np.float32), np.ones(5, np.float32)
    integrator.step([integrator.SlotStep(z, z.copy(), coef, NoiseKey(0, 0))])
    print(tasks() - before)
time.sleep(0.5)  # a thread that was joined leaves this list a moment later
print(tasks() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads")
def test_threads_are_those_asked_for(bundle, tmp_path):
    """Of engine, encoder and integrator, whose workers outlive the model; one more is the driver's."""
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

    def started(threads: int) -> list[int]:
        command = [sys.executable, "-c", ONE_THREAD, str(bundle("t5")), str(threads)]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
        return [int(line) for line in done.stdout.splitlines()]

    during, after = started(1)
    assert during <= 1 and after == 0
    during, after = started(3)
    assert during >= 4 and after == 2


STARTS_SLOWLY = """
import os, time
open(os.environ["STARTED"], "w").close()
try:
    time.sleep(1)
except BaseException:
    raise ImportError("initialization failed")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_an_import_is_not_lost(bundle, tmp_path, monkeypatch, number):
    """A library that is interrupted while it starts says that it is broken, and another would be taken."""
    (tmp_path / "lib" / "openvino").mkdir(parents=True)
    (tmp_path / "lib" / "openvino" / "__init__.py").write_text(STARTS_SLOWLY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lib"), prepend=os.pathsep)
    monkeypatch.setenv("STARTED", str(tmp_path / "started"))
    long_run(tmp_path, 3000)
    command = [*ELF_RT, "generate", str(bundle("t5")), "--input", "in.jsonl", "--output", "out.jsonl"]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for((tmp_path / "started").exists, running)
    running.send_signal(number)
    _, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (128 + number, "stopped\n")


@pytest.mark.parametrize("code", ["raise ImportError('libfoo.so.12: cannot open')", "raise ModuleNotFoundError", ""])
@pytest.mark.parametrize("library", ["numpy", "tokenizers"])
def test_a_library_that_is_not_whole_is_one_line(bundle, run_cli, tmp_path, monkeypatch, library, code):
    (tmp_path / library).mkdir()
    (tmp_path / library / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    run_cli("generate", bundle("t5"), "--prompt", "w1").assert_clear_error("a library cannot be used here")


def test_what_texts_are_made_from_is_not_written_over(bundle, run_cli, tmp_path):
    long_run(tmp_path, 1)
    (tmp_path / "link").symlink_to("in.jsonl")
    folder = Path(shutil.copytree(bundle("t5"), tmp_path / "b.elfrt"))
    for output in ("in.jsonl", "link", folder / "manifest.json", folder / "weights.bin"):
        done = run_cli("generate", folder, "--input", "in.jsonl", "--output", output)
        done.assert_clear_error("is what the texts are made from", "--output")
    assert (tmp_path / "in.jsonl").stat().st_size > 0 and Bundle.open(folder).check() is None


def test_links_that_lead_to_themselves_are_one_line(bundle, run_cli, tmp_path):
    long_run(tmp_path, 1)
    (tmp_path / "loop").symlink_to("loop")
    for command in (["generate", bundle("t5"), "--input", "in.jsonl"], ["triton", bundle("t5")]):
        run_cli(*command, "--output", "loop").assert_clear_error("link", "loop")
