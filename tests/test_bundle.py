"""The bundle refuses what it cannot vouch for, and its writers leave nothing half-done."""

import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from elf_rt import files
from elf_rt.bundle import Bundle, atomic_folder, find_bundle, write_manifest
from elf_rt.errors import BundleError
from elf_rt.files import atomic_file, sha256


@pytest.fixture
def copy(bundle, tmp_path):
    folder = tmp_path / "copy.elfrt"
    shutil.copytree(bundle("uncond"), folder)
    return folder


def edit(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}))


def test_no_tensor_is_stored_twice(bundle):
    """Both graphs read one file, of which every tensor has its own place, and no two hold the same bytes."""
    folder = bundle("head_dim_66")
    data = (folder / "weights.bin").read_bytes()
    places: dict[tuple[int, int], str] = {}
    for graph in ("denoiser.onnx", "discretizer.onnx"):
        for tensor in onnx.load(folder / graph, load_external_data=False).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                where = {entry.key: entry.value for entry in tensor.external_data}
                assert where["location"] == "weights.bin"
                places[int(where["offset"]), int(where["length"])] = tensor.name
            else:
                assert len(tensor.raw_data) < 1024
    large = [data[offset : offset + length] for offset, length in places if length >= 1024]
    assert len(large) > 20 and len(set(large)) == len(large)
    ends = sorted(places)
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(ends))
    assert sum(length for _, length in places) > 0.97 * len(data)


def test_altered_file(copy):
    weights = bytearray((copy / "weights.bin").read_bytes())
    weights[1000] ^= 1
    (copy / "weights.bin").write_bytes(weights)
    with pytest.raises(BundleError, match=r"weights\.bin was altered"):
        Bundle.open(copy).variant("fp32")


def test_missing_file(copy):
    (copy / "denoiser.onnx").unlink()
    with pytest.raises(BundleError, match=r"denoiser\.onnx is missing"):
        Bundle.open(copy).check()


def test_newer_schema(copy):
    edit(copy, schema_version=99)
    with pytest.raises(BundleError, match="schema 99, this elf-rt reads 2: update elf-rt"):
        Bundle.open(copy)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "elf-rt-bundle"}', "not json"])
def test_broken_manifest(copy, text):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=r"manifest|schema"):
        Bundle.open(copy)


def test_manifest_without_a_part(copy):
    edit(copy, presets=None)
    with pytest.raises(BundleError, match="incomplete"):
        Bundle.open(copy)


def test_absent_precision_names_the_command(copy):
    with pytest.raises(BundleError, match="--precision bf16"):
        Bundle.open(copy).variant("bf16")


def test_the_only_bundle_is_found(tmp_path, copy):
    assert find_bundle(tmp_path) == copy
    shutil.copytree(copy, tmp_path / "other.elfrt")
    with pytest.raises(BundleError, match=r"several bundles here \(copy.elfrt, other.elfrt\)"):
        find_bundle(tmp_path)
    with pytest.raises(BundleError, match="elf-rt export"):
        find_bundle(copy)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError, SystemExit])
def test_a_stopped_writer_leaves_the_old_one(tmp_path, copy, stop):
    before = sorted(p.name for p in tmp_path.iterdir())
    manifest = (copy / "manifest.json").read_text(encoding="utf-8")
    with pytest.raises(stop), atomic_folder(copy) as work:
        (work / "manifest.json").write_text("half")
        raise stop
    target = tmp_path / "out.jsonl"
    with pytest.raises(stop), atomic_file(target) as path:
        path.write_text("half")
        raise stop
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert (copy / "manifest.json").read_text(encoding="utf-8") == manifest


def test_a_writer_replaces_a_bundle_but_nothing_else(tmp_path, copy):
    with atomic_folder(copy) as work:
        (work / "manifest.json").write_text("new")
    assert [path.name for path in copy.iterdir()] == ["manifest.json"]
    assert (copy / "manifest.json").read_text(encoding="utf-8") == "new"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(BundleError, match="is not a bundle"), atomic_folder(tmp_path / "photos"):
        pass
    with pytest.raises(BundleError, match="is a folder"), atomic_file(tmp_path / "photos"):
        pass


def test_replay_holds_no_pickles(bundle):
    with np.load(bundle("uncond") / "replay.npz", allow_pickle=False) as arrays:
        assert all(arrays[name].dtype != object for name in arrays.files)


def test_an_output_keeps_its_mode_and_its_links(tmp_path):
    kept, link = tmp_path / "kept.txt", tmp_path / "link.txt"
    kept.write_text("old", encoding="utf-8")
    kept.chmod(0o600)
    link.symlink_to(kept)
    with atomic_file(link) as work:
        work.write_text("new", encoding="utf-8")
        assert kept.read_text(encoding="utf-8") == "old"
    assert link.is_symlink()
    assert kept.read_text(encoding="utf-8") == "new"
    assert kept.stat().st_mode & 0o777 == 0o600


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with atomic_file(pipe) as work:
        work.write_bytes(b"text")
    assert pipe.is_fifo()
    assert os.read(reader, 10) == b"text"
    os.close(reader)


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="needs /dev/fd")
def test_a_pipe_without_a_name_is_written_to():
    """As of --output /dev/stdout into a pipe, and of >(command)."""
    reader, writer = os.pipe()
    with atomic_file(Path(f"/dev/fd/{writer}")) as path:
        path.write_text("text")
    os.close(writer)
    assert os.read(reader, 99) == b"text"
    os.close(reader)


def test_a_file_outside_the_bundle_is_refused(copy):
    (copy.parent / "secret").write_text("x", encoding="utf-8")
    edit(copy, files={"../secret": sha256(copy.parent / "secret")})
    with pytest.raises(BundleError, match=r"names a file outside the bundle, \.\./secret"):
        Bundle.open(copy).check()


@pytest.mark.parametrize("value", ["big", 1.5, True, None])
def test_a_size_of_another_type_is_refused(copy, value):
    model = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))["model"]
    edit(copy, model=model | {"max_length": value})
    with pytest.raises(BundleError, match=r"altered: model\.max_length must be a whole number, got "):
        Bundle.open(copy)


@pytest.mark.parametrize("linked", [False, True])
def test_a_new_bundle_touches_nothing_of_a_clone_but_the_bundle(tmp_path, copy, linked):
    """Of a clone of a model's repository: its history, card, notes, other folders, and links to it all stay."""
    (copy / ".git" / "objects").mkdir(parents=True)
    (copy / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (copy / "README.md").write_text("# model card\n")
    (copy / "plans" / "sm_89").mkdir(parents=True)
    (copy / "fp16").mkdir()
    for name in ("fp16/denoiser.onnx", "fp16/notes.txt", "old.bin"):
        (copy / name).write_text("old")
    edit(copy, files=dict.fromkeys(("denoiser.onnx", "fp16/denoiser.onnx", "old.bin", "../tmp.txt"), "0" * 64))
    (tmp_path / "tmp.txt").write_text("not ours")
    target = copy
    if linked:
        target = tmp_path / "link.elfrt"
        target.symlink_to(copy)
    inode = copy.stat().st_ino
    with atomic_folder(target) as work:
        (work / "bf16").mkdir()
        for name in ("manifest.json", "denoiser.onnx", "bf16/denoiser.onnx"):
            (work / name).write_text("new")
    assert target.is_symlink() == linked and copy.stat().st_ino == inode
    left = {path.relative_to(copy).as_posix(): path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    kept = {".git/HEAD": b"ref: refs/heads/main\n", "README.md": b"# model card\n", "fp16/notes.txt": b"old"}
    made = dict.fromkeys(("manifest.json", "denoiser.onnx", "bf16/denoiser.onnx"), b"new")
    unlisted = {name: left[name] for name in ("discretizer.onnx", "weights.bin", "replay.npz") if name in left}
    assert left == kept | made | unlisted
    assert (tmp_path / "tmp.txt").exists() and not (copy / "plans").exists()


def test_the_later_of_two_exports_counts(tmp_path):
    """Both began when there was none."""
    with atomic_folder(tmp_path / "b.elfrt") as first:
        write_manifest(first, {"model": {}, "presets": {}, "variants": {}})
        with atomic_folder(tmp_path / "b.elfrt") as second:
            (second / "note").write_text("the other")
            write_manifest(second, {"model": {}, "presets": {}, "variants": {}})
    assert [path.name for path in (tmp_path / "b.elfrt").iterdir()] == ["manifest.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["b.elfrt"]


def test_a_new_bundle_does_not_write_through_links_into_other_folders(tmp_path, copy):
    elsewhere = tmp_path / "shared"
    elsewhere.mkdir()
    (elsewhere / "denoiser.onnx").write_text("theirs")
    (copy / "fp16").symlink_to(elsewhere)
    (copy / "weights.bin").unlink()
    (copy / "weights.bin").symlink_to(elsewhere / "denoiser.onnx")
    with atomic_folder(copy) as work:
        (work / "fp16").mkdir()
        for name in ("manifest.json", "weights.bin", "fp16/denoiser.onnx"):
            (work / name).write_text("new")
    assert (elsewhere / "denoiser.onnx").read_text() == "theirs"
    assert (copy / "fp16" / "denoiser.onnx").read_text() == (copy / "weights.bin").read_text() == "new"


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path, copy):
    target = tmp_path / "new.elfrt"
    for folder in (copy / ".unfinished-abc", tmp_path / ".new.elfrt.unfinished-abc"):
        folder.mkdir()
        (folder / "weights.bin").write_text("half")
    for output in (copy, target):
        with atomic_folder(output) as work, pytest.raises(BlockingIOError), files.locked(work, seconds=0):
            pass  # held: another export beside this one leaves it alone
    assert not [path for path in tmp_path.rglob("*") if "unfinished" in path.name]


def test_an_export_into_an_empty_folder_and_over_a_damaged_bundle(tmp_path, copy):
    (tmp_path / "empty").mkdir()
    (copy / "manifest.json").write_text("half a mani")
    for target in (tmp_path / "empty", copy):
        with atomic_folder(target) as work:
            (work / "manifest.json").write_text("new")
        assert (target / "manifest.json").read_text() == "new"


def test_a_folder_in_the_place_of_a_file_is_not_replaced(copy):
    (copy / "encoder.onnx").mkdir()
    before = (copy / "denoiser.onnx").read_bytes()
    with pytest.raises(BundleError, match="is a folder, where a file"), atomic_folder(copy) as work:
        for name in ("denoiser.onnx", "encoder.onnx", "manifest.json"):
            (work / name).write_text("new")
    assert (copy / "denoiser.onnx").read_bytes() == before
