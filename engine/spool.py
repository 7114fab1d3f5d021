"""Cleaned documents on their way from the sources to the tokenizer, on disk.

First all of them in one file, with an index; then one file for each split, in which each document
is ended by a zero byte, which no cleaned text contains. That is read in chunks of about a megabyte
that are cut where no token would go across, each a function of its number alone: so several
processes can share the work in any order. A row is a document, too: one line of JSON.
"""

import hashlib
import re
import struct
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from engine.prepared import SPLITS
from engine.sources import PIECE
from engine.tables import Row
from engine.wordfilter import Gate, WordFilter

ENTRY = struct.Struct("<Q16s16s16sBQ")  # of the index: a document, with the number of its split
INSIDE = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that do not begin a character
# A place where text may be cut without changing its tokens: no published split pattern joins a
# newline with a letter behind it, if a visible character stands before. \0 ends a document.
SAFE_CUT = re.compile(r"\0|(?<=\S)\n(?=[^\W\d_])")
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # all but tab and newline


class Document(NamedTuple):
    start: int  # its place in the spool, in bytes
    size: int  # bytes of UTF-8
    digest: bytes  # of its content
    group: bytes  # a digest, too: documents that are alike in it go to one split
    prompt: bytes  # likewise: they must not stand in two
    split: str  # where it was published as train, val or test; else empty
    text: int  # bytes of what is said in it: of a row, its contents without their JSON


class Spool:
    """The cleaned documents of all sources in `folder`, none empty and no two alike."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.text = open(folder / "spool", "w+b")
        self.index = open(folder / "spool_index", "w+b")
        self.splits = {name: open(folder / f"spool_{name}", "wb") for name in SPLITS}
        self.size = self.count = 0  # bytes, documents
        self.seen: set[bytes] = set()  # all that grows with the input: one digest for each document
        self.published: set[str] = set()  # the splits that documents came in, "" if in none
        self.kind = ""  # text, rows or pairs, once it is known
        self.tasks: set[str] = set()  # of rows
        self.crossing = False  # whether a prompt may stand in two splits
        self.digest = hashlib.sha256()  # of the whole
        self.written = {name: dict(bytes=0, documents=0) for name in SPLITS}

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.seen.clear()
        for file in (self.text, self.index, *self.splits.values()):
            file.close()
        for name in ("spool", "spool_index"):
            (self.folder / name).unlink()

    def add(self, pieces: Iterable[str], split: str = "", row: Row | None = None) -> str:
        """Takes one document, unless it is empty or has come before; returns which it was.

        `pieces` are those of its text; `row` is the conversation that they spell, if it is one.

        It is written at once, since its digest, and so its fate, is known at its end only. A
        published test keeps even what it repeats, so that figures on it are those of others.
        """
        self.text.seek(self.size)  # where one that was not taken is written over
        digest, size, empty = hashlib.blake2b(digest_size=16), 0, True
        for piece in pieces:
            data = piece.encode(errors="replace")  # half a surrogate pair becomes a question mark
            digest.update(data)
            self.text.write(data)
            size += len(data)
            empty = empty and not piece.strip()
        if empty:
            return "empty"
        digest = digest.digest()
        key = digest + split.removeprefix("train").encode()  # what is drawn may come to train, too
        if key in self.seen and split != "test":
            return "repeated"
        self.seen.add(key)
        kind = "text" if not row else "pairs" if row.pair else "rows"
        if self.kind not in ("", kind):
            then = "" if "pairs" in (self.kind, kind) else ", and train on both with"
            raise ValueError(
                f"the sources hold both {self.kind} and {kind}: prepare each in a folder of its"
                f" own{then and then + ' --data=FOLDER,FOLDER'}"
            )
        self.kind = kind
        prompt, group, text = digest, digest, size
        if row:
            text = sum(len(m["content"].encode(errors="replace")) for m in row.messages)
            prompt = digest_of(row.prompt())
            group = digest_of(row.group) if row.group else prompt
            self.tasks |= {row.task} - {""}
        self.published.add(split)
        self.crossing = self.crossing or split != "" or group != prompt
        entry = ENTRY.pack(size, digest, group, prompt, (*SPLITS, "").index(split), text)
        self.index.write(entry)
        # of a text, only what it is: so it is in folders that were prepared before there were rows
        self.digest.update(entry[:-8] if row or split else entry[:24])
        self.size += size
        self.count += 1
        return "taken"

    def describe(self) -> dict:
        """Equal for equal text in equal order."""
        return dict(documents=self.count, bytes=self.size, sha256=self.digest.hexdigest())

    def __iter__(self) -> Iterator[Document]:
        self.index.seek(0)
        start = 0
        for block in iter(lambda: self.index.read(4096 * ENTRY.size), b""):
            for size, *digests, number, text in ENTRY.iter_unpack(block):
                yield Document(start, size, *digests, (*SPLITS, "")[number], text)
                start += size

    def put(self, split: str, start: int, end: int, text: int) -> None:
        """Copies the bytes from `start` to `end` to a split, as one document, if there are any."""
        if start == end:
            return
        self.written[split]["bytes"] += text
        self.written[split]["documents"] += 1
        self.text.seek(start)
        while start < end:
            start += self.splits[split].write(self.text.read(min(PIECE, end - start)))
        self.splits[split].write(b"\0")

    def put_in_order(self, document: Document, val: float, test: float) -> None:
        """train | val | test: each ends after the first line end behind its fraction of the bytes.

        Where that would leave nothing to the next one, it ends after a space or a character.
        """
        fractions = {"train": 1 - val - test, "val": val, "test": test}
        wanted = [split for split, fraction in fractions.items() if fraction > 0]
        ends = [sum(fractions[split] for split in wanted[: i + 1]) for i in range(len(wanted))]
        ends = [document.start + round(end * document.size) for end in ends]
        start = document.start
        for split, end, limit in zip(wanted, ends, [*ends[1:], 0], strict=True):
            cut = self.line_end(end, limit) if limit else document.start + document.size
            self.put(split, start, cut, cut - start)
            start = cut

    def line_end(self, position: int, limit: int) -> int:
        self.text.seek(position)
        window = self.text.read(min(PIECE, limit - position))
        inside = len(window) - len(window.lstrip(INSIDE))
        near = window[:-1]
        return position + (near.find(b"\n") + 1 or near.find(b" ") + 1 or inside)


def clean(pieces: Iterable[str], report: Counter, progress: Callable) -> Iterator[str]:
    """The pieces in the one form that equal text is to have; `report` counts what was changed."""
    for piece in pieces:
        if not piece.isascii() and not unicodedata.is_normalized("NFC", piece):
            piece = unicodedata.normalize("NFC", piece)
            report["pieces brought to NFC"] += 1
        piece, removed = CONTROL.subn("", piece)
        report["control characters removed"] += removed
        report["bytes read"] += len(piece.encode(errors="replace"))
        progress(report["bytes read"])
        yield piece


class Listed(Exception):
    """A document has a word of the list, and is left out."""


def without(words: WordFilter, how: str, pieces: Iterable[str], report: Counter) -> Iterator[str]:
    """A text with the words of a list masked, or ("drop") Listed at its end, if it has one."""
    gate = Gate(words, "mask" if how == "mask" else "stop")
    for piece in chain(map(gate.feed, pieces), map(Gate.end, [gate])):
        yield piece
        report["words masked"] += len(gate.masked)
        gate.masked.clear()
    if gate.hit and how == "drop":
        raise Listed


def draw(digest: bytes, seed: int) -> float:
    """Uniform in [0, 1), and the same for equal documents."""
    hashed = hashlib.blake2b(b"%d " % seed + digest, digest_size=8).digest()
    return int.from_bytes(hashed, "big") / 2**64


def digest_of(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=16).digest()


def chunks(path: Path) -> int:
    """The number of chunks of a spool file."""
    return -(-path.stat().st_size // PIECE)


def read_chunk(path: Path, number: int, rows: bool = False) -> str:
    """Chunk `number` of a spool file, about PIECE bytes: chunks meet at safe cuts."""
    with open(path, "rb") as f:
        start, end = (boundary(f, n * PIECE, rows) for n in (number, number + 1))
        f.seek(start)
        return f.read(end - start).decode()


def boundary(f, position: int, rows: bool) -> int:
    """The first safe cut after `position`, which among rows is the end of one; in a text where none
    is near, the next whole character."""
    if position == 0:
        return 0
    f.seek(position)
    window = f.read(PIECE // 16)
    while rows and b"\0" not in window and (more := f.read(PIECE // 16)):
        window += more
    inside = len(window) - len(window.lstrip(INSIDE))
    text = window[inside:].decode(errors="ignore")
    cut = SAFE_CUT.search(text)
    return position + inside + (len(text[: cut.end()].encode()) if cut else 0)
