"""engine/files.py: a folder is whole or not there, and nothing that is not ours is touched."""

import gc
import os
import shutil
import stat
import sys
import threading
import types
from pathlib import Path

import pytest

from engine import files
from engine.files import atomic_folder


def tree(folder: Path) -> dict:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


def make(target: Path, content: str, **options) -> None:
    with atomic_folder(target, **options) as folder:
        (folder / "a.txt").write_text(content)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "new") as folder:
        (folder / "a.txt").write_text("half")
        assert not (tmp_path / "new").exists()
        raise ZeroDivisionError
    assert tree(tmp_path) == {}
    make(tmp_path / "new", "whole")
    assert tree(tmp_path) == {"new": None, "new/a.txt": b"whole"}


def test_an_empty_folder_becomes_nothing_and_replaces_nothing(tmp_path):
    make(tmp_path / "new", "first")
    with atomic_folder(tmp_path / "new", replace=True):
        pass
    assert tree(tmp_path) == {"new": None, "new/a.txt": b"first"}


def test_what_stands_there_makes_way_only_if_asked(tmp_path):
    make(tmp_path / "new", "first")
    with pytest.raises(OSError):
        make(tmp_path / "new", "second")
    assert (tmp_path / "new/a.txt").read_text() == "first"
    make(tmp_path / "new", "third", replace=True)
    assert tree(tmp_path) == {"new": None, "new/a.txt": b"third"}


@pytest.mark.parametrize("name", ["new.partial", "new.old", "new.partial/new"])
def test_a_folder_of_the_users_beside_the_output_is_not_touched(tmp_path, name):
    make(tmp_path / "new", "first")
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "thesis.txt").write_text("years of work")
    before = tree(tmp_path)
    if "partial" in name:
        with pytest.raises(ValueError, match="new.partial is in the way"):
            make(tmp_path / "new", "second", replace=True)
        assert tree(tmp_path) == before
    else:
        make(tmp_path / "new", "second", replace=True)
        assert tree(tmp_path) == before | {"new/a.txt": b"second"}


class Killed(BaseException):
    pass


def test_killed_at_any_moment_the_old_folder_or_the_new_one_is_there(tmp_path, monkeypatch):
    """Every call that changes the disk dies in turn, and all after it, as in a killed process."""
    left = None

    def counted(function):
        def call(*arguments, **options):
            nonlocal left
            if left is not None:
                left -= 1
                if left < 0:
                    raise Killed
            return function(*arguments, **options)

        return call

    for name in ("rename", "mkdir", "rmdir", "unlink", "write_text"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))
    monkeypatch.setattr(files, "lock_file", counted(files.lock_file))
    deaths = 0
    for left_at in range(100):
        folder = tmp_path / str(left_at)
        left = None
        make(folder / "new", "first")
        left = left_at
        died = False
        try:
            make(folder / "new", "second", replace=True)
        except Killed:
            died = True
        gc.collect()  # of a killed process nothing is left, no lock either
        left = None
        if not died:
            break
        deaths += 1
        place = folder / "new"
        if not place.exists():  # between the two renames: it comes back
            with atomic_folder(place):
                pass
        assert tree(place)["a.txt"] in (b"first", b"second")
        make(place, "third", replace=True)
        assert tree(folder) == {"new": None, "new/a.txt": b"third"}
    assert deaths > 10


def test_everything_is_flushed_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(files, "fsync", lambda path: calls.append(("flush", path.name)))
    rename = Path.rename
    monkeypatch.setattr(
        Path, "rename", lambda a, b: calls.append(("rename", b.name)) or rename(a, b)
    )
    with atomic_folder(tmp_path / "new") as folder:
        (folder / "a").write_text("a")
        (folder / "b").write_text("b")
    assert sorted(calls[:2]) == [("flush", "a"), ("flush", "b")]
    assert calls[2:] == [("flush", "new"), ("rename", "new"), ("flush", tmp_path.name)]


def test_a_second_process_waits_for_the_first(tmp_path):
    order = []

    def second():
        with atomic_folder(tmp_path / "new", replace=True) as folder:
            order.append("second")
            (folder / "a.txt").write_text("second")

    thread = threading.Thread(target=second)
    with atomic_folder(tmp_path / "new") as folder:
        thread.start()
        thread.join(0.3)
        order.append("first")
        (folder / "a.txt").write_text("first")
    thread.join()
    assert order == ["first", "second"]
    assert tree(tmp_path) == {"new": None, "new/a.txt": b"second"}


def test_files_are_as_readable_as_any_other(tmp_path):
    with atomic_folder(tmp_path / "new") as folder:
        (folder / "a").write_text("a")
        (folder / "a").chmod(0o600)
    (tmp_path / "b").write_text("b")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new/a", "b")]
    assert modes[0] == modes[1]


def test_windows_flushes_files_that_it_may_write_and_no_folders(tmp_path, monkeypatch):
    """There, a folder cannot be opened, a file opened for reading cannot be flushed, an open file
    cannot be deleted, and locks are another module's: stubs refuse what Windows refuses."""
    opened, locked = {}, []
    real_open, real_fsync, real_unlink = os.open, os.fsync, Path.unlink
    path_class = type(tmp_path)

    def open_(path, flags, *more, **options):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        handle = real_open(path, flags, *more, **options)
        opened[handle] = flags
        return handle

    def fsync(handle):
        if not opened[handle] & (os.O_RDWR | os.O_WRONLY):
            raise OSError(9, "Bad file descriptor")
        real_fsync(handle)

    def locking(handle, mode, size):
        locked.append(handle)

    def unlink(path, *arguments, **options):
        assert path.name != files.NOTE or all(closed(handle) for handle in locked)
        real_unlink(path, *arguments, **options)

    def closed(handle) -> bool:
        try:
            os.fstat(handle)
        except OSError:
            return True
        return False

    with monkeypatch.context() as patch:
        patch.setattr(files, "WINDOWS", True)
        patch.setattr(files, "fcntl", None)
        stub = types.SimpleNamespace(locking=locking, LK_LOCK=1, LK_NBLCK=2)
        patch.setattr(files, "msvcrt", stub, raising=False)
        patch.setattr(os, "fsync", fsync)
        patch.setattr(path_class, "unlink", unlink)
        patch.setattr(os, "open", open_)
        patch.setattr(shutil, "_use_fd_functions", False)  # as on Windows
        make(tmp_path / "new", "first")
        make(tmp_path / "new", "second", replace=True)
        files.write_durably(tmp_path / "one.json", b"{}")
    assert len(locked) == 2
    assert tree(tmp_path) == {"new": None, "new/a.txt": b"second", "one.json": b"{}"}


@pytest.mark.parametrize("damage", ["cut", "flipped", "deleted", "not listed"])
def test_a_manifest_notices_every_damage(tmp_path, damage):
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    files.write_manifest(tmp_path)
    files.verify(tmp_path, ["a.bin", "b.bin"])
    path = tmp_path / "b.bin"
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "flipped":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "deleted":
        path.unlink()
    wanted = "c.bin" if damage == "not listed" else "b.bin"
    with pytest.raises(ValueError, match=wanted):
        files.verify(tmp_path, ["a.bin", wanted])


def test_the_module_is_a_leaf_without_torch(tmp_path):
    import subprocess

    code = "import sys; import engine.files; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(files.__file__).parent.parent)
