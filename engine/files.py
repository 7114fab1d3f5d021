"""Files and folders that are whole or not there: written beside their place, flushed, renamed.

While data/python is being written, everything lies in a folder that says whose it is:

    data/python.partial/   being-written  (a note, and the lock)
                           python/        (the new folder; it leaves by one rename)
                           python.old/    (the one it replaces, until the new one is there)

Only folders with that note, or empty ones, are ever emptied or removed: nothing of the user's is.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

WINDOWS = os.name == "nt"
NOTE = "being-written"
TEXT = "The folder beside this note is not finished. If no process is at work, both can go.\n"


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:  # not mapped: that would count as memory of the whole file
        # large pieces: a thread that waits for the interpreter's lock after each hardly notices
        for block in iter(lambda: f.read(1 << 24), b""):
            digest.update(block)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    folder = path.is_dir()
    if folder and WINDOWS:  # cannot open folders; NTFS keeps a journal of its names
        return
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows flushes writers only
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A file to write, which replaces `path` at the end: readers see the old content or the new,
    even after a crash."""
    beside = path.with_name(path.name + ".partial")
    beside.write_bytes(b"")
    mode = beside.stat().st_mode  # some writers make their files for the owner only
    try:
        yield beside
        beside.chmod(mode)
        fsync(beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)  # what a full disk left half done
        raise
    fsync(path.parent)


def write_durably(path: Path, content: bytes) -> None:
    with atomic_file(path) as beside:
        beside.write_bytes(content)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def require_space(folder: Path, size: int) -> int:
    """The bytes left on the disk of `folder`. Raises OSError if they are fewer than `size`."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise OSError(
            f"the disk of {folder} is too full: this needs {size / 1e6:,.1f} MB and"
            f" {free / 1e6:,.1f} MB are free; what was saved before is whole"
        )
    return free


def lock_file(path: Path, wait: bool = True):
    """A handle that holds `path` for this process until it is closed; else BlockingIOError.

    The kernel lets go when the process dies, however it dies.
    """
    handle = open(path, "a")
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return handle
        while True:
            try:
                handle.seek(0)  # the first byte is what is locked, and not the end
                msvcrt.locking(handle.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
                return handle
            except OSError as e:  # LK_LOCK gives up after ten seconds
                if not wait:
                    raise BlockingIOError(e.errno, e.strerror) from e
    except BaseException:
        handle.close()
        raise


@contextmanager
def atomic_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """A folder to write in, which becomes `target` at the end, durably, or after an error nothing.

    Left empty, it becomes nothing. Waits for another process that makes the same. A `target` with
    something in it makes way if `replace` is set. Raises ValueError if a folder of the user's
    stands where the work should be done.
    """
    target = Path(os.path.realpath(target))  # a link leads to another disk, perhaps
    partial = target.with_name(f"{target.name}.partial")
    folder, old, note = partial / target.name, partial / f"{target.name}.old", partial / NOTE
    handle = claim(partial, note)
    try:
        clean_up(folder, old, target)  # after another process, which died
        folder.mkdir()
        yield folder
        if any(folder.iterdir()):
            for path in folder.iterdir():
                shutil.copymode(note, path)  # some writers make their files for the owner only
                fsync(path)
            fsync(folder)
            if target.exists() and (replace or not any(target.iterdir())):
                target.rename(old)
            folder.rename(target)
            fsync(target.parent)
    finally:
        with suppress(OSError):  # what is in the way now will be so next time, too
            clean_up(folder, old, target)
            if WINDOWS:  # cannot delete open files
                handle.close()
            note.unlink()  # the last: what is left without it is an empty folder
            partial.rmdir()
        handle.close()


def claim(partial: Path, note: Path):
    """Makes `partial` with its note, or takes over one whose owner is dead; returns the lock."""
    while True:
        with suppress(FileNotFoundError):  # another process has just finished, and removed it
            partial.mkdir(parents=True, exist_ok=True)
            inside = os.listdir(partial)
            if inside and NOTE not in inside:
                raise ValueError(
                    f"{partial} is in the way and was not made here: rename it, or write to"
                    " another place"
                )
            handle = lock_file(note)
            if note.exists() and os.path.samestat(note.stat(), os.fstat(handle.fileno())):
                handle.truncate(0)  # by the handle that holds the lock: Windows lets no other write
                handle.write(TEXT)
                handle.flush()
                return handle
            handle.close()


def clean_up(folder: Path, old: Path, target: Path) -> None:
    """Removes what was begun; if it stopped between two renames, what was there comes back."""
    if old.exists() and not target.exists():
        old.rename(target)
    for path in (folder, old):
        if path.exists():
            shutil.rmtree(path)


# --- manifests: size and sha256 of every file of a folder, written last


def write_manifest(folder: Path) -> None:
    files = {p.name: p for p in sorted(folder.iterdir())}
    facts = {n: dict(size=p.stat().st_size, sha256=sha256_of(p)) for n, p in files.items()}
    write_json(folder / "manifest.json", facts)


def verify(folder: Path, needed: Iterable[str], skip: Iterable[str] = ()) -> int:
    """Compares the files of `folder`, but for `skip`, with its manifest; returns how many.

    Raises ValueError, naming the damaged one, or the `needed` one that is not listed.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        names = [*needed, *(manifest.keys() - set(needed) - set(skip))]
        expected = {name: (manifest[name]["size"], manifest[name]["sha256"]) for name in names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{folder} is damaged: manifest.json is missing or broken ({e!r})") from e
    for name, (size, sha256) in expected.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else "no"
        if found != size:
            raise ValueError(f"{folder} is damaged: {name} has {found} bytes instead of {size}")
        if sha256_of(path) != sha256:
            raise ValueError(f"{folder} is damaged: {name} is not what was written (sha256)")
    return len(expected)


def files_below(folder: Path) -> Iterator[Path]:
    """All files of a folder and those in it, sorted, with the names of one folder in memory."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except PermissionError:  # such as lost+found
        return
    for entry in entries:
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from files_below(path)
        elif path.is_file():  # also of links that lead nowhere, or to themselves, this is false
            yield path
