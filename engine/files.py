"""Folders that are whole or not there, and files whose content can be checked. Needs no torch."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None

WINDOWS = os.name == "nt"
MARK = "lock"  # a file that stands in folders which are being written, and is locked meanwhile


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:  # not mapped: that would count as memory of the whole file
        # large pieces: a thread that waits for the interpreter's lock after each hardly notices
        for block in iter(lambda: f.read(1 << 24), b""):
            digest.update(block)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Waits until a file or a folder is on the disk, and not only on its way."""
    if WINDOWS and path.is_dir():
        return  # Windows opens no folders, and keeps their entries by itself
    handle = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, content: bytes) -> None:
    """Replaces a file in one step: readers see the old content or the new, even after a crash."""
    beside = path.with_name(path.name + ".partial")
    beside.write_bytes(content)
    fsync(beside)
    beside.replace(path)
    fsync(path.parent)


@contextmanager
def atomic_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """An empty folder to write in, which becomes `target` at the end in one rename, durably.

    It is called `<target>.partial` until then, and holds a locked file MARK. If the work inside
    fails, it is removed; one that a killed process has left is emptied and used again; a process
    that writes the same target is waited for. `replace` puts it in the place of an older target.
    Raises ValueError if something of that name has no MARK, for then somebody else has made it.
    """
    partial = target.with_name(f"{target.name}.partial")
    lock = take(partial)
    try:
        for leftover in partial.iterdir():
            if leftover.name != MARK:
                remove(leftover)
        yield partial
        for path in partial.iterdir():
            fsync(path)
        fsync(partial)
        aside = None
        if target.exists() and any(target.iterdir()):
            if not replace:
                raise ValueError(f"{target} has been written meanwhile: choose another name")
            aside = free_name(target.with_name(f"{target.name}.old"))
            target.rename(aside)
        elif target.exists():
            target.rmdir()
        if WINDOWS:
            lock.close()  # nothing in a folder may be open when it is renamed
        partial.rename(target)
        fsync(target.parent)
        (target / MARK).unlink(missing_ok=True)
        if aside:
            shutil.rmtree(aside)
    except BaseException:
        lock.close()
        if (partial / MARK).exists():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    lock.close()


def take(partial: Path):
    """Makes `partial`, or takes it over when nobody works in it; returns its open, locked MARK."""
    while True:
        partial.parent.mkdir(parents=True, exist_ok=True)
        if partial.exists() and not is_ours(partial):
            raise ValueError(f"{partial} is in the way: it is none of ours, so rename or remove it")
        partial.mkdir(exist_ok=True)
        try:
            lock = open(partial / MARK, "a")
        except FileNotFoundError:  # it has just been renamed
            continue
        if not fcntl:
            return lock
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits for another process
        if (partial / MARK).exists() and same_file(partial / MARK, lock):
            return lock
        lock.close()  # the other one has finished, and has renamed the folder


def is_ours(folder: Path) -> bool:
    """Whether a folder is one that `take` has made: it has a MARK, or nothing at all yet."""
    return folder.is_dir() and ((folder / MARK).exists() or not any(folder.iterdir()))


def same_file(path: Path, handle) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle.fileno()))
    except FileNotFoundError:
        return False


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def free_name(path: Path) -> Path:
    """`path`, or the first of `path`.1, .2, ... that does not exist."""
    number = 0
    found = path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}.{number}")
    return found


# --- what a folder should hold


def write_manifest(folder: Path) -> None:
    """Writes manifest.json, last: size and sha256 of each file in the folder."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
        if path.name != MARK
    }
    text = json.dumps(files, indent=2) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def verify(folder: Path, names: tuple[str, ...]) -> int:
    """Holds the files `names` against manifest.json; returns how many. Raises ValueError."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        expected = {name: (manifest[name]["size"], manifest[name]["sha256"]) for name in names}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(f"{folder} is damaged: manifest.json is missing or broken ({e!r})") from e
    for name, (size, sha256) in expected.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder} is damaged: {name} is missing")
        if path.stat().st_size != size:
            found = path.stat().st_size
            raise ValueError(f"{folder} is damaged: {name} has {found} bytes instead of {size}")
        if sha256_of(path) != sha256:
            raise ValueError(f"{folder} is damaged: {name} is not what was written (sha256)")
    return len(expected)


def require_space(folder: Path, size: int) -> int:
    """The bytes left on the disk of `folder`. Raises OSError if they are fewer than `size`."""
    exists = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(exists).free
    if size > free:
        raise OSError(
            f"the disk of {folder} is too full: {size / 1e6:,.1f} MB are needed and"
            f" {free / 1e6:,.1f} MB are free; earlier checkpoints are whole"
        )
    return free
