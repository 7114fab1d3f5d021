"""Weights that only a passphrase opens, in the format of age, by pyrage (an optional package).

    out/<run>/  key.age                    a key, locked with the passphrase (scrypt)
                base.safetensors.age       all files of tensors, locked with that key
                step-00000400/  model.safetensors.age  optimizer.safetensors.age
                                state.json, the vocabulary and the rest, as they were

`age -d -i key.age FILE` opens them without this repository (age-encryption.org/v1). age seals 64
KiB at a time with ChaCha20-Poly1305, numbered, the last one marked: so memory is constant, and no
byte can be changed, moved or left out. pyrage streams with keys alone, hence that key.
"""

import hashlib
import io
from functools import lru_cache
from pathlib import Path

from engine import files, settings

KEY, SUFFIX, TENSORS = "key.age", ".age", "*.safetensors"
OPENED: dict[bytes, object] = {}  # keys that this process may use: content of a key.age, what it is


def lock(folder: Path, passphrase: str) -> list[Path]:
    """Locks the files of tensors of a run, or of a checkpoint on its own; returns their names.

    Each makes way when the locked one is durable and was read back. Interrupted at any moment,
    this and `unlock` go on when they are called again. Raises ValueError, OSError for a full disk.
    """
    with held(folder):
        import pyrage

        plain = sorted(folder.rglob(TENSORS))
        for path in plain:
            if path.is_symlink():
                raise ValueError(f"{path} is a link, behind which the weights would stay readable")
        require_space(folder, plain)
        if not (folder / KEY).exists():
            secret = str(pyrage.x25519.Identity.generate()).encode()
            files.write_durably(folder / KEY, pyrage.passphrase.encrypt(secret, passphrase))
        key = key_in((folder / KEY).read_bytes(), passphrase)
        for path in plain:
            if not of(path).exists():  # else one of an interrupted call, or of an intruder
                with files.atomic_file(of(path)) as beside, open(beside, "wb") as target:
                    through("encrypt", path, Sink(target), key.to_public())
            if through("decrypt", of(path), Sink(), key) != files.sha256_of(path):
                raise ValueError(f"{of(path)} is another file than {path}: remove the wrong one")
            remove(path)
        return plain


def unlock(folder: Path, passphrase: str) -> list[Path]:
    """Undoes `lock`; a file has its name only when its last byte is verified."""
    if not (folder / KEY).exists():
        raise ValueError(f"{folder} is not locked: it has no {KEY}")
    with held(folder):
        key = key_in((folder / KEY).read_bytes(), passphrase)
        there = sorted(folder.rglob(TENSORS + SUFFIX))
        require_space(folder, there)
        for path in there:
            with files.atomic_file(path.with_suffix("")) as beside, open(beside, "wb") as target:
                through("decrypt", path, Sink(target), key)
            remove(path)
        remove(folder / KEY)
        return there


# --- opened in memory


def use(passphrase_file: str, *folders: Path) -> None:
    """Lets this process read those of these runs or checkpoints that are locked. Raises ValueError
    if one is and the passphrase is none or wrong; also for a passphrase that nothing needs."""
    keys = [key for folder in folders if (key := key_of(folder))]
    if passphrase_file and not keys:
        named = " and ".join(map(str, folders))
        raise ValueError(f"{named}: no {KEY}, so nothing is locked: leave --passphrase_file out")
    for key in keys:
        if not passphrase_file:
            raise ValueError(f"{key.parent} is locked: give --passphrase_file=FILE to open it")
        OPENED[key.read_bytes()] = key_in(key.read_bytes(), read_passphrase(passphrase_file))


def names(folder: Path) -> list[str]:
    """The files of a checkpoint that are locked. Raises ValueError if this process has no key."""
    there, key = [path.with_suffix("") for path in folder.glob(TENSORS + SUFFIX)], key_of(folder)
    if not key:
        if all(path.exists() for path in there):  # if any, an `unlock` was killed near its end
            return []
        raise ValueError(f"{folder} is locked, and the {KEY} of its run is missing: bring it back")
    if key.read_bytes() not in OPENED:
        raise ValueError(
            f"{folder} is locked: sample.py, evaluate.py and serve.py open it with"
            f" --passphrase_file=FILE, all others after `python weights.py unlock {key.parent}`"
        )
    return [path.name for path in there]


def read(file: Path, sha256: str) -> bytes:
    """What was in a file before it was locked, in memory alone. Raises ValueError unless every
    byte is sound. One in plain text will not do: who has no passphrase could have put it there."""
    if not of(file).exists():
        again = "if `weights.py lock` was interrupted, call it again"
        raise ValueError(f"{of(file)} is missing: bring it back, or {again}")
    content, key = io.BytesIO(), OPENED[key_of(file.parent).read_bytes()]
    if through("decrypt", of(file), Sink(content), key) != sha256:
        raise ValueError(f"{of(file)} is not what belongs here (sha256): bring it back")
    return content.getvalue()


def of(file: Path) -> Path:
    return file.with_name(file.name + SUFFIX)


def key_of(folder: Path) -> Path | None:
    """The key of a run, or of a checkpoint, alone or in a run; None if it is not locked."""
    found = (folder / KEY, folder.absolute().parent / KEY)
    return next((key for key in found if key.exists()), None)


@lru_cache  # scrypt takes a second, and 256 or 512 MB, so that nobody tries many
def key_in(content: bytes, passphrase: str):
    """What a key.age holds. Raises ValueError."""
    settings.require_package("pyrage", True)
    import pyrage

    try:
        secret = pyrage.passphrase.decrypt(content, passphrase).decode()
        return pyrage.x25519.Identity.from_str(secret.strip())
    except (pyrage.DecryptError, pyrage.IdentityError, OSError, ValueError) as e:
        raise ValueError(f"the passphrase does not open {KEY}: one of them is wrong") from e


def read_passphrase(file: str) -> str:
    line = Path(file).read_bytes().decode("utf-8-sig", errors="replace")
    line = line.removesuffix("\n").removesuffix("\r")
    if not line or "\n" in line or "\ufffd" in line:
        raise ValueError(f"passphrase_file={file!r} should hold one line of UTF-8, the passphrase")
    return line


# --- files


def held(folder: Path):
    """A handle that keeps others out of a run, or a checkpoint on its own; what was half written
    there is gone. Raises ValueError."""
    settings.require_package("pyrage", True)
    manifest = folder / "manifest.json"
    if manifest.exists() and (folder.absolute().parent / "lock").exists():
        raise ValueError(f"{folder} is part of a run, which is locked as a whole: name its folder")
    try:
        handle = files.lock_file(manifest if manifest.exists() else folder / "lock", wait=False)
    except BlockingIOError as e:
        raise ValueError(f"another process works in {folder}: try again when it has ended") from e
    for leftover in folder.rglob(f"{TENSORS}*.partial"):  # of one that was killed
        leftover.unlink()
    return handle


def require_space(folder: Path, paths: list[Path]) -> None:
    files.require_space(folder, max((path.stat().st_size for path in paths), default=0))


def through(what: str, path: Path, sink: "Sink", key) -> str:
    """Encrypts or decrypts a file to `sink`; returns the sha256 of what came there.

    Before that nothing of it is to be used: what is cut off shows at the end. Raises ValueError.
    """
    import pyrage

    try:
        with open(path, "rb") as source:
            getattr(pyrage, f"{what}_io")(source, sink, [key])
    except (pyrage.EncryptError, pyrage.DecryptError, OSError) as e:
        if sink.error:
            raise sink.error from None
        why = " ".join(str(e).split())
        raise ValueError(f"{path} is damaged ({why}): bring it back, or remove it") from e
    return sink.sha256.hexdigest()


class Sink:
    """Takes what pyrage writes, to `file` if there is one; keeps an exception of its own, a full
    disk or a Ctrl-C, of which pyrage leaves words alone."""

    def __init__(self, file=None):
        self.file, self.sha256, self.error = file, hashlib.sha256(), None

    def write(self, piece: bytes) -> int:
        try:
            self.sha256.update(piece)
            return self.file.write(piece) if self.file else len(piece)
        except BaseException as e:
            self.error = e
            raise


def remove(path: Path) -> None:
    path.unlink()
    files.fsync(path.parent)
