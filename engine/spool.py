"""Cleaned text on its way from the sources to the tokenizer: one file on disk for each split.

A spool file holds the documents of a split one after the other, each ended by a zero byte, which no
cleaned text contains. It is read in chunks of about a megabyte that are cut where no token would go
across, each a function of its number alone: so several processes can share the work in any order.
"""

import hashlib
import io
import re
import sys
import tempfile
import unicodedata
from collections import Counter
from itertools import chain
from pathlib import Path

from engine.sources import PIECE, documents

SPLITS = ("train", "val", "test")
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # all but tab and newline
INSIDE = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that do not begin a character
# A place where text may be cut without changing its tokens: no published split pattern joins a
# newline with a letter behind it, if a visible character stands before. \0 ends a document.
SAFE_CUT = re.compile(r"\0|(?<=\S)\n(?=[^\W\d_])")


def spool(s, folder: Path, report: Counter, progress) -> None:
    """Cleans the documents of all sources of settings `s`; writes folder/spool_train and so on.

    `report` counts documents and bytes, read, removed and written; `progress` is told the bytes.
    """
    files = {split: open(folder / f"spool_{split}", "wb") for split in SPLITS}
    seen: set[bytes] = set()  # all that grows with the input: one digest for each document
    for source in s.source:
        cleaned = clean(documents(source, s.pattern, s.field), folder, report, seen, progress)
        first, second = next(cleaned, None), next(cleaned, None)
        if first and not second:  # a source of one document is cut in three
            cut_in_order(first[0], files, s, report)
            continue
        for text, digest in chain(filter(None, (first, second)), cleaned):
            draw = hashlib.blake2b(b"%d " % s.seed + digest, digest_size=8).digest()
            u = int.from_bytes(draw, "big") / 2**64  # uniform in [0, 1)
            split = "val" if u < s.val else "test" if u < s.val + s.test else "train"
            append(text, files[split], split, report)
    for file in files.values():
        file.close()


def clean(docs, folder: Path, report: Counter, seen: set[bytes], progress):
    """Yields (file of cleaned text, digest) for each document that is not empty and not seen."""
    for doc in docs:
        # a long document waits on disk, since its digest, and so its fate, is known at its end only
        text = tempfile.SpooledTemporaryFile(max_size=8 * PIECE, dir=folder)
        digest, empty = hashlib.blake2b(digest_size=16), True
        for piece in doc:
            if not piece.isascii() and not unicodedata.is_normalized("NFC", piece):
                piece = unicodedata.normalize("NFC", piece)
                report["pieces brought to NFC"] += 1
            piece, removed = CONTROL.subn("", piece)
            report["control characters removed"] += removed
            empty = empty and not piece.strip()
            data = piece.encode(errors="replace")  # half a surrogate pair becomes a question mark
            digest.update(data)
            text.write(data)
            report["bytes read"] += len(data)
            progress(report["bytes read"])
        report["documents read"] += 1
        if empty or digest.digest() in seen:
            report["empty documents" if empty else "repeated documents"] += 1
            continue
        seen.add(digest.digest())
        text.seek(0)
        yield text, digest.digest()


def append(text, file, split: str, report: Counter, count: int = sys.maxsize) -> None:
    """Copies up to `count` bytes of `text` to a spool file, as one document."""
    while count and (block := text.read(min(PIECE, count))):
        file.write(block)
        report[split, "bytes"] += len(block)
        count -= len(block)
    file.write(b"\0")
    report[split, "documents"] += 1


def cut_in_order(text, files: dict, s, report: Counter) -> None:
    """train | val | test: each ends after the first line end behind its fraction of the bytes."""
    size = text.seek(0, io.SEEK_END)

    def line_end(fraction: float, start: int) -> int:
        text.seek(max(start, round(fraction * size)))
        line = text.readline(PIECE)
        if not line.endswith(b"\n"):  # none near: after a space, or at least after a character
            text.seek(-len(line), io.SEEK_CUR)
            text.readline(line.find(b" ") + 1 or len(line) - len(line.lstrip(INSIDE)))
        return text.tell()

    first = line_end(1 - s.val - s.test, 0) if s.val + s.test else size
    second = line_end(1 - s.test, first) if s.val and s.test else size if s.val else first
    cuts = [0, first, second, size]
    for split, start, end in zip(SPLITS, cuts, cuts[1:], strict=False):
        if end > start:
            text.seek(start)
            append(text, files[split], split, report, end - start)


def read_chunk(path: Path, number: int) -> str:
    """Chunk `number` of a spool file, about PIECE bytes: chunks meet at safe cuts."""
    with open(path, "rb") as f:
        start, end = boundary(f, number * PIECE), boundary(f, (number + 1) * PIECE)
        f.seek(start)
        return f.read(end - start).decode()


def boundary(f, position: int) -> int:
    """The first safe cut after `position`; the next whole character if none is near."""
    if position == 0:
        return 0
    f.seek(position)
    window = f.read(PIECE // 16)
    inside = len(window) - len(window.lstrip(INSIDE))
    text = window[inside:].decode(errors="ignore")
    cut = SAFE_CUT.search(text)
    return position + inside + (len(text[: cut.end()].encode()) if cut else 0)
