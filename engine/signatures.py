"""Who made these files: a list of all that a folder holds, signed with Ed25519 (RFC 8032).

    <folder>/signed.json    {"files": {"model.safetensors": {"sha256": ..., "size": ...}, ...}, ...}
             signed.sig     64 bytes, a signature of just the bytes of signed.json

A sha256 beside a file tells that it is whole, and not whose it is: who swaps one swaps the other.
A signature cannot be made without the private key. The public one must come by another way than
the files do. Keys are PEM files, and openssl checks the same: openssl pkeyutl -verify -rawin
-pubin -inkey me.pub -in signed.json -sigfile signed.sig. By cryptography, an optional package.
"""

import json
import os
from contextlib import suppress
from pathlib import Path

from engine import files, settings

LIST, SIGNATURE = "signed.json", "signed.sig"
FORMAT = "signed files, 1"  # what is signed says what it is: it stands for nothing else


def make_keys(name: str) -> None:
    """Writes NAME.key, which only its owner can read, and NAME.pub. Raises ValueError."""
    settings.require_package("cryptography", True)
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private, public = Path(f"{name}.key"), Path(f"{name}.pub")
    for path in (private, public):
        if path.exists():
            raise ValueError(f"{path} exists already: choose another name")
    key, pem = Ed25519PrivateKey.generate(), form.Encoding.PEM
    with open(os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
        f.write(key.private_bytes(pem, form.PrivateFormat.PKCS8, form.NoEncryption()))
    subject = form.PublicFormat.SubjectPublicKeyInfo
    files.write_durably(public, key.public_key().public_bytes(pem, subject))


def sign(folder: Path, key: Path) -> int:
    """Signs all files of a folder; returns how many."""
    private, listed = read_key(key, folder, "private"), manifest(folder)
    files.write_durably(folder / LIST, listed)
    files.write_durably(folder / SIGNATURE, private.sign(listed))
    return len(json.loads(listed)["files"])


def verify(folder: Path, key: Path) -> int:
    """How many files a folder holds, each just as the owner of the public `key` has signed it.

    Raises ValueError for a signature by another, for files that are changed or missing, and for
    those that were not signed. Reads bytes, and makes nothing of them.
    """
    public = read_key(key, folder, "public")  # tells what to install if the package lacks
    from cryptography.exceptions import InvalidSignature

    if not (folder / LIST).is_file() or not (folder / SIGNATURE).is_file():
        if not Path(folder).is_dir():
            raise ValueError(f"no such folder: {str(folder)!r}")
        raise ValueError(f"{folder} is not signed: it lacks {LIST} or {SIGNATURE}")
    listed = (folder / LIST).read_bytes()
    try:
        public.verify((folder / SIGNATURE).read_bytes(), listed)
    except InvalidSignature as e:
        raise ValueError(f"{folder} is not signed by {key}, or {LIST} was changed since") from e
    if FORMAT.encode() not in listed:
        raise ValueError(f"{folder / LIST} is signed, and no list of files of this kind")
    found = manifest(folder)
    if found != listed:
        was, now = (json.loads(text)["files"] for text in (listed, found))
        wrong = [f"{n!r} is missing" for n in was if n not in now]
        wrong += [f"{n!r} was not signed" for n in now if n not in was]
        wrong += [f"{n!r} was changed" for n in now if n in was and now[n] != was[n]]
        raise ValueError(f"{folder} is not what was signed: {', '.join(wrong[:5])}")
    return len(json.loads(listed)["files"])


def manifest(folder: Path) -> bytes:
    """Size and sha256 of every file in a folder and below, but for list and signature: JSON with
    its names in order and no blanks, so that the same files give the same bytes."""
    if not folder.is_dir():
        raise ValueError(f"no such folder: {str(folder)!r}")
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is a link or no file, and could be anything: remove it")
        if path.is_file() and name not in (LIST, SIGNATURE):
            found[name] = dict(size=path.stat().st_size, sha256=files.sha256_of(path))
    content = dict(files=found, format=FORMAT)
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def read_key(path: Path, folder: Path, half: str):
    """The private or public key in a PEM file. Raises ValueError."""
    settings.require_package("cryptography", True)
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ed25519

    if folder.resolve() in path.resolve().parents:
        raise ValueError(f"key={str(path)!r} lies among the files themselves: keep it elsewhere")
    content, read = path.read_bytes(), None
    with suppress(ValueError, TypeError, UnsupportedAlgorithm):
        if half == "private":
            kind, read = ed25519.Ed25519PrivateKey, form.load_pem_private_key(content, None)
        else:
            kind, read = ed25519.Ed25519PublicKey, form.load_pem_public_key(content)
    if not read or not isinstance(read, kind):
        raise ValueError(
            f"{path} is no {half} Ed25519 key: `python weights.py keys NAME` makes NAME.key, to"
            " sign, and NAME.pub, to verify"
        )
    return read
