"""NVRTC: every GPU generation compiles without spills, and the cache gives back only what it should."""

import re

import pytest

from elf_rt.device import kernels
from elf_rt.errors import BackendError

try:
    kernels._nvrtc()
except BackendError as missing:
    pytest.skip(str(missing), allow_module_level=True)

GENERATIONS = [75, 80, 86, 87, 89, 90, 100, 120]
MAX_REGISTERS = 65536 // (3 * kernels.BLOCK)  # three blocks a multiprocessor, so that loads hide each other's wait


@pytest.mark.parametrize("sm", GENERATIONS)
def test_compiles_without_spills(sm):
    cubin, log = kernels.compile_cubin(sm)
    assert cubin[:4] == b"\x7fELF"
    assert kernels.NAME.encode() in cubin
    assert re.findall(r"Compiling entry function '(\w+)'", log) == [kernels.NAME]
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert memory == [("0", "0", "0")]
    (registers,) = re.findall(r"Used (\d+) registers", log)
    assert int(registers) <= MAX_REGISTERS


@pytest.fixture
def compiled(monkeypatch):
    """Compiling replaced by something quick; a list of what was compiled."""
    calls = []

    def compile_cubin(sm):
        calls.append(sm)
        return b"\x7fELF" + bytes([sm, len(calls)]), ""

    monkeypatch.setattr(kernels, "compile_cubin", compile_cubin)
    return calls


def test_second_use_comes_from_the_cache(tmp_path, compiled):
    first = kernels.get_cubin(80, tmp_path / "made")
    assert kernels.get_cubin(80, tmp_path / "made") == first
    assert compiled == [80] and len(list((tmp_path / "made").iterdir())) == 1


@pytest.mark.parametrize("damage", [lambda old: old[:-1], lambda old: b"\0" * len(old), lambda old: b""])
def test_a_damaged_cache_file_is_replaced(tmp_path, compiled, damage):
    kernels.get_cubin(80, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    again = kernels.get_cubin(80, tmp_path)
    assert compiled == [80, 80] and path.read_bytes().endswith(again)
    assert kernels.get_cubin(80, tmp_path) == again and list(tmp_path.iterdir()) == [path]


def test_what_a_cubin_is_made_from_names_it(tmp_path, compiled, monkeypatch):
    kernels.get_cubin(80, tmp_path)
    kernels.get_cubin(90, tmp_path)
    source, header = kernels._sources()
    monkeypatch.setattr(kernels, "_sources", lambda: (source, header + "\n"))
    kernels.get_cubin(80, tmp_path)
    monkeypatch.setattr(kernels, "_version", lambda nvrtc: "1.0")
    kernels.get_cubin(80, tmp_path)
    assert compiled == [80, 90, 80, 80] and len(list(tmp_path.iterdir())) == 4


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, compiled, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert kernels.get_cubin(80, blocked)[:4] == b"\x7fELF"
    assert "compiled kernels are not kept" in caplog.text


def test_unknown_gpu_and_bad_source_are_clear(monkeypatch):
    with pytest.raises(BackendError, match=r"knows no sm_10: pip install"):
        kernels.compile_cubin(10)
    monkeypatch.setattr(kernels, "_sources", lambda: ("__device__ int f() { return undefined_name; }", ""))
    with pytest.raises(BackendError, match=r"refused integrator.cu for sm_80: .*undefined_name"):
        kernels.compile_cubin(80)


def test_nvrtc_missing_is_one_clear_line(monkeypatch):
    def fail(name):
        raise ImportError(name)

    monkeypatch.setattr(kernels.importlib, "import_module", fail)
    kernels._nvrtc.cache_clear()
    with pytest.raises(BackendError, match=r"NVRTC is not installed.*pip install"):
        kernels.get_cubin(80)
