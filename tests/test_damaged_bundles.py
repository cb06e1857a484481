"""A bundle is believed only as far as it was checked: bytes, manifest, graphs, tables, tokenizers, links, remembered
digests."""

import base64
import copy as copies
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from text_side import ROWS, WIDTH, text_bundle

import elf_rt
from elf_rt import files
from elf_rt.arrays import open_table
from elf_rt.bundle import COPIES, Bundle
from elf_rt.errors import BundleError, ElfError, InputError
from elf_rt.files import sha256
from elf_rt.manifest import MANIFEST, Manifest
from elf_rt.measure.verify import verify
from elf_rt.text.codec import TextCodec
from elf_rt.text.tokenizer import TextTokenizer

BACKENDS = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return text_bundle(tmp_path_factory.mktemp("words"))


@pytest.fixture
def copy(words, tmp_path):
    return Path(shutil.copytree(words, tmp_path / "copy.elfrt"))


def reseal(folder: Path, *names: str) -> None:
    """The manifest of files that were changed on purpose."""
    values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    values["files"] |= {name: sha256(folder / name) for name in names}
    (folder / MANIFEST).write_text(json.dumps(values), encoding="utf-8")


def use(folder: Path, backend: str = "onnxruntime") -> list:
    with elf_rt.load(folder, backend, precision="fp32") as model:
        return [result.ids.tolist() for result in model.generate(["w1 w2"], 2, seed=0, steps=2)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["words", "t5"])
def test_a_flipped_bit_in_any_file_is_refused(words, bundle, tmp_path, case, backend):
    folder = Path(shutil.copytree(words if case == "words" else bundle("t5"), tmp_path / "flipped.elfrt"))
    opened = elf_rt.load(folder, backend, precision="fp32")
    readers = {  # of files that are not read when a backend opens: what opens them, each anew
        "encoder": lambda: use(folder, backend),
        "tokenizer": lambda: TextCodec(Bundle.open(folder)),
        "embedding": lambda: TextCodec(Bundle.open(folder)),
        "replay": lambda: verify(opened),
    }
    names = Manifest.read(folder / MANIFEST).files
    assert len(names) == {"words": 6, "t5": 7}[case]
    for name in names:
        content = (folder / name).read_bytes()
        middle = len(content) // 2
        (folder / name).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        with pytest.raises(BundleError, match="was altered"):
            Bundle.open(folder).check()
        with pytest.raises(BundleError, match="was altered"):
            readers.get(name.split(".")[0], lambda: elf_rt.load(folder, backend, precision="fp32"))()
        (folder / name).write_bytes(content)
    opened.close()


def walk(value, path=()):
    yield path
    if isinstance(value, dict) and path != ("files",):
        for key in value:
            yield from walk(value[key], (*path, key))


@pytest.mark.parametrize("other", [..., None, "text", -1, [], {}, 1e400, True])
def test_every_field_of_the_manifest_is_checked(copy, other):
    """Gone, or of another type: one line that names it, or a bundle that is as good as before."""
    path = copy / MANIFEST
    good = json.loads(path.read_text(encoding="utf-8"))
    for place in walk(good):
        if not place:
            continue
        manifest = copies.deepcopy(good)
        inner = manifest
        for key in place[:-1]:
            inner = inner[key]
        if other is ...:
            del inner[place[-1]]
        else:
            inner[place[-1]] = other
        path.write_text(json.dumps(manifest), encoding="utf-8")
        try:
            opened = Bundle.open(copy)
        except BundleError as error:
            assert "\n" not in str(error)
            if len(place) > 1 and other != 1e400 and place[0] not in ("files", "variants"):
                assert place[-1] in str(error)
        else:
            optional = place in (("exporter",), ("encoder", "source"), ("tokenizer", "file"), ("agreement", "bf16"))
            optional |= (
                place in (("variants", "fp32"), ("encoder",), ("source", "layout"), ("source", "step"))
                or place[-1] in ("grid_mean", "grid_std")
                or place[0] == "files"
                or other is not ...
            )
            assert optional, place
            if "fp32" in opened.variants:
                opened.variant("fp32")
    path.write_text(json.dumps(good | {"made_by_a_later_elf_rt": 1}), encoding="utf-8")
    Bundle.open(copy)


@pytest.mark.parametrize(
    "text", ["[" * 10**5, '{"format": NaN}', "\ufeff{}", "<html>sign in</html>", "version https://git-lfs.github.com/x"]
)
def test_no_manifest(copy, text):
    (copy / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(BundleError):
        Bundle.open(copy)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "fp16/../../x", "C:\\x", ""])
def test_names_stay_inside(copy, name):
    values = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    values["files"][name] = "0" * 64
    (copy / MANIFEST).write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(BundleError, match="names a file outside the bundle"):
        Bundle.open(copy)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weights.bin", lambda b: b + bytes(64), r"has \d+ bytes, its graphs have weights of"),
        ("weights.bin", lambda b: b[:-64], r"has \d+ bytes, its graphs have weights of"),
        ("denoiser.onnx", lambda b: b"", "is no graph"),
        ("denoiser.onnx", lambda b: b[: len(b) // 2], "is no graph"),
        ("denoiser.onnx", lambda b: b.replace(b"weights.bin", b"weights.txt"), "which manifest.json does not name"),
        ("denoiser.onnx", lambda b: b.replace(b"\x01z\x12", b"\x01y\x12"), r"is no denoiser of .* \(see its y, z\)"),
    ],
)
def test_files_that_do_not_fit_together(copy, backend, name, change, message):
    (copy / name).write_bytes(change((copy / name).read_bytes()))
    reseal(copy, name)
    with pytest.raises(BundleError, match=message):
        use(copy, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_wrong_graph_under_a_name(copy, backend):
    (copy / "denoiser.onnx").write_bytes((copy / "discretizer.onnx").read_bytes())
    reseal(copy, "denoiser.onnx")
    with pytest.raises(BundleError, match=r"is no denoiser of .* \(see its ids, mode, s, t, x, x_prev, z\)"):
        use(copy, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_of_a_graph_that_are_wrong_from_the_start(copy, backend):
    """With the manifest's blessing: refused in one line by us or by the engine, or of no consequence."""
    name, rng = "denoiser.onnx", np.random.default_rng(0)
    content = (copy / name).read_bytes()
    for at in rng.integers(0, len(content), 5):
        (copy / name).write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        reseal(copy, name)
        try:
            use(copy, backend)
        except ElfError as error:
            assert "\n" not in str(error)


GOOD = np.ones((ROWS, WIDTH), np.float32)


@pytest.mark.parametrize(
    "table",
    [
        GOOD.ravel(),
        GOOD[None],
        GOOD[:, :-1],
        GOOD[:9],
        GOOD.astype(np.int64),
        GOOD.astype("U4"),
        GOOD.astype(np.complex64),
        GOOD.astype(object),
        GOOD.astype([("a", "f4")]),
        np.where(np.arange(WIDTH) == 3, np.nan, GOOD).astype(np.float32),
        np.where(np.arange(WIDTH) == 3, -np.inf, GOOD).astype(np.float32),
    ],
)
def test_tables_that_are_none(copy, table):
    np.save(copy / "embedding.npy", table, allow_pickle=True)
    reseal(copy, "embedding.npy")
    with pytest.raises(BundleError, match=r"embedding\.npy"):
        use(copy)


def test_a_table_by_columns_is_the_same_table(tmp_path):
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.save(tmp_path / "table.npy", np.asfortranarray(table))
    np.testing.assert_array_equal(open_table(tmp_path / "table.npy", (4, 3))[[2, 0]], table[[2, 0]])


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b[:-4],
        lambda b: b + bytes(4),
        lambda b: b"",
        lambda b: b[:7],
        lambda b: b.replace(b"(97, 32)", b"(1000000000000, 32)".ljust(8))[: len(b)],
        lambda b: b.replace(b"(97, 32)", b"(-7, 32)"),
        lambda b: b.replace(b"'<f4'", b"'|O'  "[:5]),
    ],
)
def test_tables_with_a_damaged_header(copy, change):
    np.save(copy / "embedding.npy", GOOD)
    (copy / "embedding.npy").write_bytes(change((copy / "embedding.npy").read_bytes()))
    reseal(copy, "embedding.npy")
    with pytest.raises(BundleError, match=r"embedding\.npy"):
        use(copy)


def charsmap(data: bytes) -> dict:
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}}


@pytest.mark.parametrize(
    "changes",
    [
        charsmap(b"\xff\xff\xff\xff\xff"),  # the library would take 8 GB, and abort
        charsmap(b""),
        charsmap(b"\x05\0\0\0\0\0\0\0\0"),
        {"normalizer": {"type": "Sequence", "normalizers": [charsmap(b"\xff" * 9)["normalizer"]]}},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"],
                   "continuing_subword_prefix": "######"}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [1], "continuing_subword_prefix": "#"}},
        {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
        {"model": {"type": "WordLevel", "vocab": {"a": 4_000_000_000}, "unk_token": "a"}},
        {"model": []},
    ],
)  # fmt: skip
def test_tokenizers_that_would_take_the_process_along(copy, changes):
    path = copy / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    reseal(copy, "tokenizer.json")
    with pytest.raises(ElfError, match=r"tokenizer\.json"):
        use(copy)


def test_a_panic_of_the_tokenizer_is_an_error(copy):
    path = copy / "tokenizer.json"
    pattern = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"normalizer": pattern}))
    with pytest.raises(InputError, match=r"tokenizer\.json cannot encode this text"):
        TextTokenizer(path).encode("a" * 40 + "!")


def as_links(folder: Path, root: Path, *, apart: bool) -> Path:
    """A bundle whose files are links: into one folder as in the Hub's cache, or each in its own as in git-annex."""
    made = root / "snapshots" / "model.elfrt"
    for number, file in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        link = made / file.relative_to(folder)
        blob = root / "blobs" / (f"{number}/{number}" if apart else str(number))
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return made


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("case", ["words", "t5"])
def test_files_may_be_links(words, bundle, tmp_path, monkeypatch, backend, apart, case):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = words if case == "words" else bundle("t5")
    linked = as_links(folder, tmp_path, apart=apart)
    left = tmp_path / "cache" / "elf-rt" / f"{COPIES}of-a-process-that-was-killed"
    left.mkdir(parents=True)
    assert use(linked, backend) == use(folder, backend)
    assert not left.exists()
    (linked / "weights.bin").resolve().write_bytes(b"x")
    with pytest.raises(BundleError, match="was altered"):
        use(linked, backend)


@pytest.mark.parametrize("name", ["weights.bin", "denoiser.onnx", "encoder.bin", "tokenizer.json"])
def test_one_file_may_be_a_link(bundle, tmp_path, monkeypatch, name):
    """Large ones alone, as git-annex may be told."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(bundle("t5"), tmp_path / "b.elfrt"))
    (folder / name).rename(tmp_path / "object")
    (folder / name).symlink_to("../object")
    assert use(folder) == use(bundle("t5"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), "git lfs pull"),
        (lambda p: p.write_text("/annex/objects/SHA256E-s9--0.bin\n"), "git annex get"),
        (lambda p: p.write_text("\n <!DOCTYPE html>\n<title>Sign in"), "is a web page"),
        (lambda p: p.write_text('<?xml version="1.0"?><Error><Code>AccessDenied'), "is a web page"),
        (lambda p: (p.unlink(), p.symlink_to("../.git/annex/objects/a/b/c")), "git annex get"),
        (lambda p: (p.unlink(), p.symlink_to("../../blobs/0")), "is a link to a file that is not here: download it"),
        (lambda p: (p.unlink(), p.with_name(p.name + ".dvc").write_text("outs:")), "dvc pull"),
        (lambda p: p.unlink(), "is missing"),
        (lambda p: (p.unlink(), p.mkdir()), "is no file"),
        (lambda p: (p.unlink(), os.mkfifo(p)), "is no file"),  # which would wait for a writer
        (lambda p: (p.unlink(), p.symlink_to("/dev/zero")), "is no file"),  # which has no end
    ],
)
@pytest.mark.parametrize("name", ["weights.bin", "tokenizer.json", "embedding.npy", MANIFEST])
def test_what_stands_in_a_files_place(copy, name, spoil, message):
    spoil(copy / name)
    with pytest.raises(BundleError, match=f"{message}|has no manifest"):
        use(copy)


def test_large_files_are_hashed_once(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "REMEMBERED_FROM_BYTES", 0)
    read = []
    monkeypatch.setattr(files, "sha256", lambda path: (read.append(path.name), sha256(path))[1])

    def names() -> list[str]:
        read.clear()
        Bundle.open(copy).variant("fp32")
        return sorted(read)

    everything = ["denoiser.onnx", "discretizer.onnx", "weights.bin"]
    assert names() == names() == everything  # too young to be sure of
    monkeypatch.setattr(files, "SETTLED_SECONDS", 0)
    assert names() == everything
    assert names() == []
    for known in (tmp_path / "cache").rglob("*"):
        if known.is_file():
            known.write_bytes(known.read_bytes()[:-3] + b"0" + known.read_bytes()[-2:])  # of the digest
    assert names() == everything and names() == []
    weights, status = copy / "weights.bin", (copy / "weights.bin").stat()
    content = bytearray(weights.read_bytes())
    content[99] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))  # size and time as before: the inode's change tells
    with pytest.raises(BundleError, match="was altered"):
        names()
    for known in (tmp_path / "cache").rglob("*"):
        if known.is_file():
            known.write_text("[1, 2")
    content[99] ^= 1
    weights.write_bytes(content)
    assert names() == everything
    opened = Bundle.open(copy)
    opened.check()
    assert opened.digest is not files.remembered_sha256


def test_a_cache_that_cannot_be_written_changes_nothing(copy, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "REMEMBERED_FROM_BYTES", 0)
    monkeypatch.setattr(files, "SETTLED_SECONDS", 0)
    Bundle.open(copy).variant("fp32")


@pytest.mark.parametrize("damage", ["page", "cut", "empty", "swapped", "foreign", "seal"])
def test_openvino_trusts_no_cache_that_was_damaged(copy, tmp_path, monkeypatch, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    want = use(copy, "openvino")
    cache = tmp_path / "cache" / "elf-rt" / "openvino"
    blobs = sorted(cache.rglob("*.blob"), key=lambda path: path.stat().st_size)
    assert len(blobs) == 2
    small, large = (path.read_bytes() for path in blobs)
    made = {
        "page": [small, large[:4096] + bytes(4096) + large[8192:]],
        "cut": [small, large[:-4096]],
        "empty": [b"", b""],
        "swapped": [large, small],
        "foreign": [small, os.urandom(len(large))],
        "seal": [small, large],
    }[damage]
    for path, content in zip(blobs, made, strict=True):
        path.write_bytes(content)
    if damage == "seal":
        next(cache.rglob("seal")).write_bytes(b"?")
    assert use(copy, "openvino") == want
    assert [path.read_bytes() != b"" for path in blobs if path.exists()]
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.blob")}
    assert use(copy, "openvino") == want
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.blob")} == before  # sound, so used
