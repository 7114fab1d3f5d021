"""Cleaned documents on their way from the sources to the tokenizer, on disk.

First all of them in one file, with an index; then one file for each split, in which each document
is ended by a zero byte, which no cleaned text contains. That is read in chunks of about a megabyte
that are cut where no token would go across, each a function of its number alone: so several
processes can share the work in any order. A row is a document, too: one line of JSON.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

from engine import settings
from engine.duplicates import Shingles
from engine.index import ELSEWHERE, Document, Index
from engine.prepared import SPLITS
from engine.sources import PIECE
from engine.tables import Row
from engine.wordfilter import Gate, WordFilter

INSIDE = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that do not begin a character
# A place where text may be cut without changing its tokens: no published split pattern joins a
# newline with a letter behind it, if a visible character stands before. \0 ends a document.
SAFE_CUT = re.compile(r"\0|(?<=\S)\n(?=[^\W\d_])")
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # all but tab and newline


class Spool:
    """The cleaned documents of all sources in `folder`, none empty and, once settled, no two alike.

    `index` knows all of them; the text of those of `part`, as 3/16, is kept, and they are what is
    iterated over. Equal texts are of one part, and so are rows that ask the same.
    """

    def __init__(self, folder: Path, part: str, near: float):
        self.folder, self.near = folder, near
        self.part, self.parts = map(int, (part or "1/1").split("/"))
        self.text = open(folder / "spool", "w+b")
        self.index = Index(folder)
        self.splits = {name: open(folder / f"spool_{name}", "wb") for name in SPLITS}
        self.end = 0  # bytes of text
        self.kind = ""  # text, rows or pairs, once it is known
        self.tasks: set[str] = set()  # of rows
        self.written = {name: dict(bytes=0, documents=0) for name in SPLITS}

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.index.close()
        for file in (self.text, *self.splits.values()):
            file.close()
        (self.folder / "spool").unlink()

    def __iter__(self) -> Iterator[Document]:
        if self.parts == 1:
            return iter(self.index)
        return (document for document in self.index if document.start != ELSEWHERE)

    def add(self, pieces: Iterable[str], split: str = "", row: Row | None = None) -> str:
        """Takes one document, unless it is empty; returns which it was.

        `pieces` are those of its text; `row` is the conversation that they spell, if it is one. It
        is written at once, since its digest, and so its part, is known at its end only.
        """
        self.text.seek(self.end)  # where one that was not kept is written over
        digest, size, empty = hashlib.blake2b(digest_size=16), 0, True
        shingles = Shingles() if self.near else None
        for piece in pieces:
            data = piece.encode(errors="replace")  # half a surrogate pair becomes a question mark
            digest.update(data)
            self.text.write(data)
            size += len(data)
            empty = empty and not piece.strip()
            if shingles:
                shingles.feed(piece)
        if empty:
            return "empty"
        kind = "text" if not row else "pairs" if row.pair else "rows"
        if self.kind not in ("", kind):
            then = "" if "pairs" in (self.kind, kind) else ", and train on both with"
            raise ValueError(
                f"the sources hold both {self.kind} and {kind}: prepare each in a folder of its"
                f" own{then and then + ' --data=FOLDER,FOLDER'}"
            )
        self.kind = kind
        digest = digest.digest()
        prompt, group, text = digest, digest, size
        if row:
            text = sum(len(m["content"].encode(errors="replace")) for m in row.messages)
            prompt = digest_of(row.prompt())
            group = digest_of(row.group) if row.group else prompt
            self.tasks |= {row.task} - {""}
        mine = int.from_bytes(prompt, "little") % self.parts == self.part - 1
        start = self.end if mine else ELSEWHERE
        document = Document(size, digest, group, prompt, split, text, start)
        self.index.add(document, shingles and shingles.least)
        self.end += size * mine
        return "taken"

    def require_kind(self, s) -> None:
        """Raises ValueError for a setting that is for another kind of documents."""
        text = self.kind == "text"
        for_rows = "0 for running text, which has no prompts"
        settings.require(not (text and s.noise), s, "noise", for_rows)
        for_text = "0 for rows: a secret is a line of running text"
        settings.require(text or not s.canaries, s, "canaries", for_text)
        settings.require(text or not s.near, s, "near", "0 for rows: it compares running text")

    def require_splits(self, fractions: dict[str, float]) -> None:
        """Raises ValueError if train has nothing, or, of a whole source, another split."""
        there = f"{self.index.count} documents, {self.index.size} bytes"
        if not self.written["train"]["bytes"]:
            remedy = "use more text, or smaller --val and --test"
            if self.parts > 1:
                remedy = f"{there} are too few for {self.parts} parts"
            raise ValueError(f"nothing is left to train on: {remedy}")
        for name, fraction in fractions.items() if self.parts == 1 else ():
            published = name in self.index.published
            if (fraction or published) and not self.written[name]["bytes"]:
                remedy = f"use a larger --{name}, more text, or --{name}=0"
                if published:
                    remedy = f"all that was published as {name} is asked in test, too: leave it out"
                raise ValueError(f"nothing fell into the {name} split ({there}): {remedy}")

    def describe(self) -> dict:
        """Equal for equal text in equal order, of all parts."""
        known = self.index
        return dict(documents=known.count, bytes=known.size, sha256=known.digest.hexdigest())

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
