"""Libraries that are absent, half there, or talkative; each is one line, and the others still work."""

import os
import re
from pathlib import Path

import pytest

from elf_rt.errors import BackendError, first_line, last_line
from elf_rt.libraries import ORT_TELEMETRY, import_library, needs, why_absent

ROOT = Path(__file__).parents[1]


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Puts a module or package of this name and source before the real one, for this process and its children."""

    def make(name: str, source: str) -> None:
        folder = tmp_path / "stubs" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(source, encoding="utf-8")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stubs"))
        monkeypatch.syspath_prepend(tmp_path / "stubs")

    return make


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            'raise ImportError("libfoo.so.12: cannot open shared object file")',
            "(libfoo.so.12: cannot",
        ),
        ('raise OSError("libbar.so: file too short\\nmore")', "cannot be imported (libbar.so: file too short):"),
        ("import no_such_thing", "not installed completely (no_such_thing is missing)"),
        ("numpy = 1 / 0", "cannot be imported (division by zero)"),
        ("raise RuntimeError", "cannot be imported (RuntimeError)"),
        ("x = 1", "a broken install"),
    ],
)
def test_what_is_wrong_with_a_library(stub, source, reason):
    stub("broken_engine", source)
    told = why_absent("broken_engine", "InferenceSession", "pip install it")
    assert told is not None and reason in told and told.endswith(": pip install it") and "\n" not in told


def test_absent_libraries_and_parts():
    for name in ("no_such_engine", "no_such_engine.core"):
        assert why_absent(name, "x", "pip install it") == "not installed: pip install it"
    assert why_absent("json", "loads", "") is None


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            ModuleNotFoundError("No module", name="elf_rt.export"),
            "export is not in the source folder that Python found here: pip install -e . in the clone",
        ),
        (ModuleNotFoundError("No module", name="torch"), "export needs torch: pip install 'elf-rt[export]'"),
        (
            ImportError("libtorch.so: undefined symbol: x"),
            "export cannot import a library that is installed (libtorch.so: undefined symbol: x): "
            "pip install 'elf-rt[export]'",
        ),
        (
            OSError("libtorch.so: file too short"),
            "export cannot import a library that is installed (libtorch.so: file too short): "
            "pip install 'elf-rt[export]'",
        ),
    ],
)
def test_what_a_command_needs(error, told):
    with pytest.raises(BackendError) as caught, needs("export", "pip install 'elf-rt[export]'"):
        raise error
    assert str(caught.value) == told and caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("one\ntwo"), "one"),
        (RuntimeError("in a node:\nthe reason\nmore"), "in a node: the reason"),
        (RuntimeError("in a file:\nin a node:\nthe reason\nmore"), "in a file: the reason"),
        (ValueError(), "ValueError"),
        (MemoryError("Unable to allocate 3 GiB"), "memory ran out (Unable to allocate 3 GiB): ask for fewer"),
        (MemoryError(), "memory ran out (MemoryError): ask for fewer"),
        (RuntimeError("std::bad_alloc"), "memory ran out (std::bad_alloc): ask for fewer"),
        (RuntimeError("a:\nnode x can't allocate 9 bytes"), "memory ran out (a: node x can't allocate 9 bytes): ask"),
        (
            RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 9"),
            "memory ran out ([ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 9): ask",
        ),
    ],
)
def test_what_a_library_says_in_one_line(error, line):
    told = first_line(error)
    assert told.startswith(line) and "\n" not in told and (told == line or "memory" in line)


def test_what_a_library_says_last():
    assert last_line(RuntimeError("while loading:\nthe cause\n")) == "the cause"
    assert last_line(RuntimeError("while loading:\nstd::bad_alloc")).startswith("memory ran out (std::bad_alloc): ask")


@pytest.mark.parametrize(
    ("name", "error"),
    [("onnxruntime", "ImportError"), ("openvino", "OSError"), ("tensorrt", "RuntimeError")],
)
def test_doctor_lives_with_a_broken_engine(run_cli, stub, name, error):
    stub(name, f'raise {error}("libfoo.so.12: cannot open shared object file")')
    done = run_cli("doctor")
    (line,) = [line for line in done.out.splitlines() if line.split()[1:2] == [name]]
    assert done.code == 0 and "libfoo.so.12" in line and "not installed" not in line
    assert f"ok  {'openvino' if name == 'onnxruntime' else 'onnxruntime'}" in done.out


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A new home and temporary folder, and no variable that turns telemetry off."""
    for name in ("CI", "GITHUB_ACTIONS", ORT_TELEMETRY, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home" / "tmp").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "home" / "tmp"))
    return tmp_path / "home"


def test_nothing_is_sent_or_kept_for_sending(run_cli, bundle, home):
    """ONNX Runtime keeps a device identifier and a database of events in the user's cache where its telemetry is on."""
    for args in (["doctor"], ["generate", bundle("t5"), "--prompt", "a la", "--steps", "1"], ["verify", bundle("t5")]):
        done = run_cli(*args)
        assert done.code == 0, done.err
    assert not list((home / "tmp").iterdir())
    assert {p.relative_to(home).parts[:2] for p in home.rglob("*") if p.is_file()} <= {(".cache", "elf-rt")}


@pytest.mark.parametrize(("value", "kept"), [("0", "0"), ("true", "1"), ("", "1")])
def test_who_wants_telemetry_says_so(monkeypatch, value, kept):
    monkeypatch.setenv(ORT_TELEMETRY, value)
    import_library("json")
    assert os.environ[ORT_TELEMETRY] == kept


def test_engines_come_through_one_door():
    """An import of its own would turn telemetry on, or call a broken install absent."""
    own = re.compile(r"^\s*(import (onnxruntime|openvino|nncf|tensorrt)|from (onnxruntime|openvino|nncf|tensorrt))\b")
    for folder in ("elf_rt", "export", "engines"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = path.read_text(encoding="utf-8").splitlines()
            for before, line in zip(["", *lines], lines, strict=False):
                assert not own.match(line) or "TYPE_CHECKING" in before, f"{path}: {line}"
