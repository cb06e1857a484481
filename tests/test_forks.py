"""Processes with texts in flight: children that are forked from them, and their own end."""

import gc
import os
import signal
import subprocess
import sys
import time

import pytest

from elf_rt.bundle import Bundle
from elf_rt.files import locked


def run(script, tmp_path, *args, timeout=120):
    command, env = [sys.executable, "-c", script, *map(str, args)], {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, cwd=tmp_path)


FORK = """
import os, signal, sys, elf_rt
model = elf_rt.load(sys.argv[1], sys.argv[2], precision="fp32", threads=2)
want = model.generate(seed=3, steps=2)[0].ids.tolist()
child = os.fork()
if child == 0:
    signal.alarm(30)
    same = model.generate(seed=3, steps=2)[0].ids.tolist() == want
    sys.exit(0 if same else 3)  # in the normal way, as a worker of gunicorn --preload ends
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert model.generate(seed=3, steps=2)[0].ids.tolist() == want
sys.exit(abs(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_forked_child_writes_the_same_text_and_exits(bundle, backend, tmp_path):
    pytest.importorskip(backend)
    done = run(FORK, tmp_path, bundle("cond"), backend)
    assert done.returncode == 0, done.stderr


FORK_IN_FLIGHT = """
import asyncio, os, pickle, signal, sys, elf_rt
from elf_rt.errors import BackendError
model = elf_rt.load(sys.argv[1], "onnxruntime", precision="fp32", threads=1)
over = model.submit(elf_rt.Text(seed=1))
over.result()
pending = model.submit(elf_rt.Text(seed=0, params=model.params(steps=500)))
stream = model.stream(seed=0, steps=500)
next(stream)
def told(call):
    try: call()
    except BackendError as error: return str(error)
assert "belongs to its process" in told(lambda: pickle.dumps(pending))
child = os.fork()
if child == 0:
    signal.alarm(30)
    async def drafts(): return [draft async for draft in pending]
    async def wait(): return await pending
    waits = [pending.result, lambda: list(pending), lambda: next(stream)]
    waits += [lambda: asyncio.run(drafts()), lambda: asyncio.run(wait())]
    good = all("forked" in told(wait) for wait in waits) and not pending.cancel() and over.result()
    sys.exit(0 if good else 3)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert pending.cancel()
sys.exit(abs(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_texts_of_the_parent_are_not_waited_for_in_a_forked_child(bundle, tmp_path):
    done = run(FORK_IN_FLIGHT, tmp_path, bundle("cond"))
    assert done.returncode == 0, done.stderr


FORK_ELSEWHERE = """
import os, pathlib, signal, sys, threading, elf_rt
folder = pathlib.Path(sys.argv[1])
os.chdir(folder.parent)
model = elf_rt.load(folder.name, "onnxruntime", precision="fp32", threads=1)
want = model.generate(seed=3, steps=2)[0].ids.tolist()
os.chdir("/")
child = os.fork()
if child == 0:
    signal.alarm(30)
    texts = []
    write = lambda: texts.append(model.generate(seed=3, steps=2)[0].ids.tolist())
    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    drivers = sum(thread.name == "elf-rt" for thread in threading.enumerate())
    os._exit(0 if texts == [want] * 4 and drivers == 1 else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_threads_of_a_forked_child_share_one_model_wherever_it_goes(bundle, tmp_path):
    done = run(FORK_ELSEWHERE, tmp_path, bundle("cond"))
    assert done.returncode == 0, done.stderr


FORK_AFTER_CLOSE = """
import os, signal, sys, elf_rt
def write():
    with elf_rt.load(sys.argv[1], sys.argv[2], precision="fp32", threads=1) as model:
        return model.generate(seed=3, steps=2)[0].ids.tolist(), model.backend.name
want, _ = write()
child = os.fork()
if child == 0:
    signal.alarm(30)
    try: os._exit(0 if write()[0] == want else 3)
    except elf_rt.BackendError as error: os._exit(4 if "start it by spawn" in str(error) else 5)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("backend", "code"), [("onnxruntime", 0), ("openvino", 4), ("auto", 0)])
def test_a_child_that_was_forked_after_a_model_was_closed_hangs_in_none(bundle, backend, code, tmp_path):
    """OpenVINO's threads are left by the first model, and are not there in the child."""
    pytest.importorskip("openvino")
    done = run(FORK_AFTER_CLOSE, tmp_path, bundle("cond"), backend)
    assert done.returncode == code, done.stderr


IN_FLIGHT = """
import sys, elf_rt
model = elf_rt.load(sys.argv[1], sys.argv[2], precision="fp32", threads=1)
pending = [model.submit(elf_rt.Text(seed=k, params=model.params(steps=1000))) for k in range(20)]
while not model.stats().calls: pass
"""


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_interpreter_with_texts_in_flight_exits(bundle, backend, tmp_path):
    pytest.importorskip(backend)
    done = run(IN_FLIGHT, tmp_path, bundle("cond"), backend, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_leaves_the_copies_of_links_to_its_parent(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "b.elfrt").mkdir()
    for file in bundle("t5").iterdir():
        (tmp_path / "b.elfrt" / file.name).symlink_to(file)
    opened = Bundle.open(tmp_path / "b.elfrt")
    copy = opened.path("weights.bin")
    child = os.fork()
    if child == 0:
        del opened
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert copy.exists()
    del opened
    gc.collect()
    assert not copy.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_folder_is_free_after_its_block_although_a_child_that_was_forked_in_it_lives(tmp_path):
    with locked(tmp_path):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with locked(tmp_path, seconds=0):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
