"""Files: written whole or not at all, known by their sha256, and what lies in the place of one that was not fetched."""

import codecs
import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from elf_rt.errors import BundleError
from elf_rt.machine import user_cache

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_SECONDS = 10.0  # that other processes may hold a folder: they move files, or compile a network
UNFINISHED = ".unfinished-"
ABANDONED_AFTER_SECONDS = 24 * 3600  # where a folder cannot be locked, so that only its age tells
REMEMBERED_FROM_BYTES = 1 << 24  # smaller files are hashed in 10 ms
SETTLED_SECONDS = 2  # the coarsest clock of a file system: a file younger than that may change and keep its time
SEAL, SEAL_BYTES = "seal", 32

_held: set[int] = set()  # handles of the folders that this process has locked
_log = logging.getLogger(__name__)


def sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_sha256(path: Path) -> str:
    """The same, but a large file is read once: its digest is kept in the user's cache for as long as size, both times
    and inode stay. Bits that rot on the disk change none of these, so whoever checks for that calls ``sha256``."""
    status = path.stat()
    if status.st_size < REMEMBERED_FROM_BYTES:
        return sha256(path)
    known = user_cache() / "sha256" / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    identity = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]
    if (content := read_sealed(known)) is not None:
        *remembered, digest = json.loads(content)
        if remembered == identity:
            return str(digest)
    digest = sha256(path)
    age = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns)
    if age > SETTLED_SECONDS * 1e9:
        write_sealed(known, json.dumps([*identity, digest]).encode())
    return digest


def is_utf8(path: Path) -> bool:
    """Whether libraries that take paths as text can open it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def is_inside(name: str) -> bool:
    """Whether a name can only be that of a file below the folder it is joined to, on every system. Links may lead out
    of it, as they do in the Hub's cache: what they lead to is known by its sha256."""
    parts = PurePosixPath(name).parts
    plain = not any(char in name for char in "\\:\0")
    return plain and bool(parts) and not name.startswith("/") and ".." not in parts


def why_not_here(path: Path) -> str | None:
    """What stands where a file should be, and how to fetch the file; None: nothing that is known to stand for one."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "is no file, but a folder, a pipe or a device: put the file in its place"
        with path.open("rb") as file:
            start = file.read(256).removeprefix(codecs.BOM_UTF8).lstrip().lower()
    except FileNotFoundError:
        if path.with_name(f"{path.name}.dvc").is_file():
            return "is missing, but DVC knows it: run dvc pull"
        if not path.is_symlink():
            return "is missing"
        annexed = "annex" in Path(os.readlink(path)).parts
        return "is a link to a file that is not here: " + ("run git annex get" if annexed else "download it again")
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself: run git lfs install, then git lfs pull"
    if start.startswith((b"/annex/objects/", b"../.git/annex/")):
        return "is a git-annex pointer, not the file itself: run git annex get"
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")) and path.suffix != ".xml":
        return "is a web page, not the file itself: if this network has a login page, log in, then download it again"
    return None


def read_sealed(path: Path) -> bytes | None:
    """What ``write_sealed`` wrote; None when the file is gone, or is not what was written."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    seal, content = content[:SEAL_BYTES], content[SEAL_BYTES:]
    return content if hashlib.sha256(content).digest() == seal else None


def write_sealed(path: Path, content: bytes, what: str = "") -> None:
    """Keep bytes in a cache, with their checksum before them. Where it cannot, the next start makes them again.

    Args:
        what: the bytes' name, in the plural, for a warning in the log that they are not kept; "": no warning.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as work:
            work.write_bytes(hashlib.sha256(content).digest() + content)
    except (OSError, BundleError) as error:
        if what:
            _log.warning("%s are not kept: %s", what, error)


@contextlib.contextmanager
def sealed_folder(folder: Path, digest: Callable[[Path], str]) -> Iterator[None]:
    """A cache folder of a library that trusts what it finds there. What is not as the last such block left it is
    deleted before the block; one process at a time is in it.

    Args:
        digest: the sha256 of a file.

    Raises:
        OSError: the folder cannot be made, held or cleaned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        with contextlib.suppress(OSError):  # in a cache that came with an image
            os.utime(folder)  # ``remove_oldest`` goes by it
        known: dict[str, str] = json.loads(read_sealed(folder / SEAL) or b"{}")
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != SEAL and known.get(path.name) != digest(path):
                known.pop(path.name, None)
                path.unlink()
        yield
        now = {path.name: known.get(path.name) or sha256(path) for path in folder.iterdir() if path.name != SEAL}
        if now != known:
            write_sealed(folder / SEAL, json.dumps(now).encode())


def remove_oldest(parent: Path, keep: int) -> None:
    """Delete all folders but those that were used last, as far as no process holds them."""
    folders = [folder for folder in parent.iterdir() if folder.is_dir()] if parent.exists() else []
    for folder in sorted(folders, key=lambda each: each.stat().st_mtime, reverse=True)[keep:]:
        with contextlib.suppress(OSError), locked(folder, seconds=0):
            shutil.rmtree(folder)


def writable_target(path: Path) -> Path:
    """Where a file of this path can be written: what a link leads to, so that the link stays.

    Raises:
        BundleError: it is a folder or read-only, or in no folder that is there and can be written in.
    """
    if path.is_dir():
        raise BundleError(f"{path} is a folder: name a file")
    path = path.resolve()
    if not path.parent.is_dir():
        raise BundleError(f"the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise BundleError(f"cannot write in {path.parent}")
    if path.exists() and not os.access(path, os.W_OK):
        raise BundleError(f"{path} is read-only: name another file")
    return path


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A temporary path beside ``target`` that takes its name when the block succeeds.

    A file that is there keeps its mode and the links to it; a device or a pipe is written to directly.
    """
    if target.exists() and not target.is_file() and not target.is_dir():
        yield target  # before it is resolved: /dev/stdout may lead to a pipe, which has no path
        return
    target = writable_target(target)
    work = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    os.close(os.open(work, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        if target.exists():
            work.chmod(stat.S_IMODE(target.stat().st_mode))
        yield work
        os.replace(work, target)
    finally:
        work.unlink(missing_ok=True)


@contextlib.contextmanager
def unfinished_folder(parent: Path, prefix: str = UNFINISHED) -> Iterator[Path]:
    """A new hidden folder in ``parent``, locked while the block runs and gone after it, unless the block moved it.

    What a killed process left under the same prefix is removed first.
    """
    with contextlib.ExitStack() as held:
        with locked(parent):  # no other process may take the new folder for an abandoned one before it is locked
            remove_abandoned(parent, prefix)
            work = parent / f"{prefix}{secrets.token_hex(8)}"
            held.callback(_remove_own, work, os.getpid())  # before it is there: a signal may come at any moment
            work.mkdir(0o700)
            held.enter_context(locked(work))
        yield work


def _remove_own(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child leaves it to its parent
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(parent: Path, prefix: str = UNFINISHED) -> None:
    """Delete unfinished folders that no process holds: those that made them were killed."""
    for work in parent.iterdir():
        if not work.name.startswith(prefix) or not work.is_dir():
            continue
        if fcntl is None and time.time() - work.stat().st_mtime < ABANDONED_AFTER_SECONDS:
            continue
        with contextlib.suppress(OSError), locked(work, seconds=0):  # BlockingIOError: it is held
            shutil.rmtree(work)


@contextlib.contextmanager
def locked(folder: Path, *, seconds: float | None = None) -> Iterator[None]:
    """Hold a folder against other processes that lock it too; the system lets go when this process ends.

    Raises:
        BlockingIOError: another process holds it for longer than so many seconds, LOCK_SECONDS by default.
    """
    if fcntl is None:
        yield
        return
    end, handle = time.monotonic() + (LOCK_SECONDS if seconds is None else seconds), os.open(folder, os.O_RDONLY)
    owner = os.getpid()
    _held.add(handle)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= end:
                    told = "another process holds it, and may be stopped"
                    raise BlockingIOError(error.errno, told, str(folder)) from error
                time.sleep(0.02)
        yield
    finally:
        if os.getpid() == owner:  # not in a child that was forked in the block
            _held.discard(handle)
            fcntl.flock(handle, fcntl.LOCK_UN)  # a child that was just forked may still have to let go
            os.close(handle)


def _let_go() -> None:
    """In a forked child, which would hold what its parent holds, and for as long as it lives."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
