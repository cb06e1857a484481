"""Plan folders appear whole or not at all: builds that are killed, that race, that fail while writing."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from plan_bundles import golden_bundle, rtx_spec

from elf_rt.bundle import Bundle
from elf_rt.engines import store
from elf_rt.engines.build import build, find_built


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return golden_bundle(tmp_path_factory.mktemp("store") / "uncond.elfrt", precisions=("fp16",))


# A process that builds one plan and says when it has come to a moment; there it waits to be killed. It imports neither
# torch nor this file, to start quickly.
BUILDER = """
import signal, sys, time
from elf_rt import cli
from elf_rt.bundle import Bundle
from elf_rt.engines import build as building
from elf_rt.engines.recipe import RECIPES
from elf_rt.engines.shapes import parse_profiles
from elf_rt.plans import Machine, this_machine

def hold(*_, **__):
    print("there", flush=True)
    time.sleep(60)

bundle, moment = Bundle.open(sys.argv[1]), sys.argv[2]
request = building.PlanRequest("fp16", (89,), parse_profiles("1", None, bundle.config))
spec = building.plan_spec(bundle, RECIPES["tensorrt-rtx"], Machine(this_machine().os, None), request)
if moment == "parsed":
    building.set_attention = hold
elif moment == "between":
    real = building._build_graph
    building._build_graph = lambda spec, name, *rest: hold() if name == "discretizer" else real(spec, name, *rest)
elif moment == "writing":
    signal.signal(signal.SIGTERM, cli._stop)  # as under the command line
    building.Record.write = hold
elif moment == "compiling":
    class Slow(building._monitor_class(spec.recipe.library.load())):
        def phase_start(self, name, parent, steps):
            print("there", flush=True)
            self._stop.wait(20)
    building._monitor_class = lambda trt: Slow
elif moment == "together":
    print("there", flush=True)
    sys.stdin.readline()
print(building.build(spec).key)
"""


def start_builder(bundle: Bundle, moment: str) -> "subprocess.Popen[str]":
    """A builder that has come to the moment."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", BUILDER, str(bundle.folder), moment]
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=bundle.folder)
    assert process.stdout is not None
    if process.stdout.readline() != "there\n":
        pytest.fail(process.communicate()[1])
    return process


@pytest.fixture
def copied(bundle: Bundle, tmp_path: Path) -> Bundle:
    """A copy of the module's bundle, for other processes to build in."""
    return Bundle.open(shutil.copytree(bundle.folder, tmp_path / "copy.elfrt", ignore=shutil.ignore_patterns("plans")))


@pytest.mark.parametrize("moment", ["parsed", "between", "writing"])
@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_a_killed_build_leaves_nothing(copied: Bundle, moment: str, how: str) -> None:
    before = set(copied.folder.rglob("*"))
    process = start_builder(copied, moment)
    half_written = [path for path in set(copied.folder.rglob("*")) - before if path.is_file()]
    assert len(half_written) == (2 if moment == "writing" else 0)
    process.send_signal(getattr(signal, how))
    process.communicate(timeout=20)
    assert process.returncode != 0
    left = [path for path in set(copied.folder.rglob("*")) - before if path.is_file()]
    if how == "SIGKILL" and moment == "writing":  # nobody can tidy up after it: hidden, and gone at the next build
        assert all(path.parent.name.startswith(store.UNFINISHED) for path in left)
        build(rtx_spec(copied))
        assert len(list(copied.plans_dir.iterdir())) == 1
    else:
        assert left == []


def test_ctrl_c_stops_the_library_in_the_middle_of_its_work(copied: Bundle) -> None:
    process = start_builder(copied, "compiling")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=15)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert not copied.plans_dir.exists()


def test_two_builds_of_one_key_at_once_both_succeed(copied: Bundle) -> None:
    processes = [start_builder(copied, "together") for _ in range(2)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60) for process in processes]
    spec = rtx_spec(copied)
    assert [output for output, _ in outputs] == [f"{spec.key}\n"] * 2, outputs
    assert [path.name for path in copied.plans_dir.iterdir()] == [spec.target.name]
    assert find_built(spec.target, spec.key) is not None


def test_a_build_in_progress_is_not_swept_away(tmp_path: Path) -> None:
    plans = tmp_path / "plans"
    with store.new_plan(plans / "one", "key") as first:
        (first / "file").write_text("x")
        with store.new_plan(plans / "two", "key") as second:
            assert first.is_dir() and second.is_dir()
    assert sorted(path.name for path in plans.iterdir()) == ["one", "two"]


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"), store.new_plan(tmp_path / "plans" / "one", "key") as folder:
        (folder / "denoiser.plan").write_bytes(b"half")
        raise OSError("disk full")
    assert list((tmp_path / "plans").iterdir()) == []
