"""A folder is whole or not there, and nothing that somebody else has made is touched."""

import os
import shutil
import threading
import time

import pytest

from engine import files
from engine.files import MARK, atomic_folder, fsync, verify, write_manifest


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write(target, text: str = "new", **options) -> None:
    with atomic_folder(target, **options) as partial:
        (partial / "a.txt").write_text(text)


def test_a_folder_appears_whole(tmp_path):
    with atomic_folder(tmp_path / "made") as partial:
        (partial / "a.txt").write_text("a")
        assert names(tmp_path) == {"made.partial"}
    assert names(tmp_path) == {"made"} and names(tmp_path / "made") == {"a.txt"}


def test_who_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), atomic_folder(tmp_path / "made") as partial:
        (partial / "a.txt").write_text("a")
        raise KeyError
    assert names(tmp_path) == set()


def test_what_a_killed_process_has_left_is_used_again(tmp_path):
    left = tmp_path / "made.partial"
    left.mkdir()
    (left / MARK).touch()
    (left / "half").write_text("x")
    write(tmp_path / "made")
    assert names(tmp_path) == {"made"} and names(tmp_path / "made") == {"a.txt"}


def test_a_folder_of_somebody_else_is_never_touched(tmp_path):
    (tmp_path / "made.partial").mkdir()
    (tmp_path / "made.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"made\.partial is in the way"):
        write(tmp_path / "made")
    assert (tmp_path / "made.partial" / "thesis.txt").read_text() == "mine"
    assert names(tmp_path) == {"made.partial"}


def test_replacing_touches_no_older_copy(tmp_path):
    write(tmp_path / "made", "first")
    (tmp_path / "made.old").mkdir()
    (tmp_path / "made.old" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="made has been written"):
        write(tmp_path / "made", "second")
    assert (tmp_path / "made" / "a.txt").read_text() == "first"
    write(tmp_path / "made", "second", replace=True)
    assert (tmp_path / "made" / "a.txt").read_text() == "second"
    assert names(tmp_path) == {"made", "made.old"}
    assert (tmp_path / "made.old" / "thesis.txt").read_text() == "mine"


def test_a_second_writer_waits_for_the_first(tmp_path):
    pytest.importorskip("fcntl", reason="Windows has no such lock")
    order = []

    def second():
        with pytest.raises(ValueError, match="written meanwhile"), atomic_folder(tmp_path / "made"):
            order.append("second is inside")

    with atomic_folder(tmp_path / "made") as partial:
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        (partial / "a.txt").write_text("a")
        order.append("first is done")
    thread.join()
    assert order == ["first is done", "second is inside"]
    assert names(tmp_path) == {"made"}


def test_all_is_on_disk_before_the_rename(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(files, "fsync", lambda path: calls.append(path.name))
    rename = files.Path.rename
    monkeypatch.setattr(
        files.Path, "rename", lambda a, b: calls.append(f"{a.name} > {b.name}") or rename(a, b)
    )
    with atomic_folder(tmp_path / "made") as partial:
        (partial / "a.txt").write_text("a")
        (partial / "b.txt").write_text("b")
    flushed = calls[: calls.index("made.partial > made")]
    assert {"a.txt", "b.txt"} <= set(flushed) and flushed[-1] == "made.partial"
    assert calls[-1] == tmp_path.name


def test_windows_opens_no_folders_and_writes_what_it_flushes(tmp_path, monkeypatch):
    """Stubs of what Windows refuses: opening a folder, flushing what is open for reading only, and
    renaming a folder in which a file is open."""
    opened, flags, real_open, real_fsync = {}, os.O_RDWR, os.open, os.fsync

    def windows_open(path, how, *more, **options):
        if os.path.isdir(path) and not options:  # shutil.rmtree has a way of its own there
            raise PermissionError(13, "Permission denied", str(path))
        handle = real_open(path, how, *more, **options)
        opened[handle] = how
        return handle

    def windows_fsync(handle):
        if opened.get(handle, flags) & 3 != flags:
            raise OSError(9, "Bad file descriptor")
        real_fsync(handle)

    locks = []
    take, rename = files.take, files.Path.rename

    def windows_rename(path, target):
        inside = [lock for lock in locks if os.path.dirname(lock.name) == str(path)]
        assert all(lock.closed for lock in inside), "a file in it is open"
        return rename(path, target)

    monkeypatch.setattr(files, "take", lambda p: locks.append(take(p)) or locks[-1])
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files.Path, "rename", windows_rename)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "open", windows_open)
        patch.setattr(files.os, "fsync", windows_fsync)
        with pytest.raises(OSError):
            fsync(tmp_path)  # the stubs do refuse
        patch.setattr(files, "WINDOWS", True)
        write(tmp_path / "made")
        write(tmp_path / "made", replace=True)
    assert names(tmp_path / "made") == {"a.txt"}


@pytest.mark.parametrize("damage", ["short", "changed", "missing", "no manifest", "other manifest"])
def test_damage_is_noticed_and_named(tmp_path, damage):
    write(tmp_path / "made", "content")
    write_manifest(tmp_path / "made")
    assert verify(tmp_path / "made", ("a.txt",)) == 1
    path = tmp_path / "made" / "a.txt"
    manifest = tmp_path / "made" / "manifest.json"
    if damage == "short":
        path.write_text("conten")
    elif damage == "changed":
        path.write_text("c0ntent")
    elif damage == "missing":
        path.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text("[1]")
    with pytest.raises(ValueError, match="damaged: (a.txt|manifest)"):
        verify(tmp_path / "made", ("a.txt",))


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert files.require_space(tmp_path / "not there", 1000) == 1000
    with pytest.raises(OSError, match=r"2.0 MB are needed and 0.0 MB are free"):
        files.require_space(tmp_path / "not there", 2_000_000)
