"""What is known of each document, on disk, and the split that it goes to: of all parts of a source,
also of those whose text is prepared elsewhere. So all that is compared or counted for the splits is
the same in each part."""

import hashlib
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine import duplicates
from engine.prepared import SPLITS

ENTRY = struct.Struct("<Q16s16s16sBQQ")  # a Document, with the number of its split; for numpy:
DIGEST = ("<u8", 2)
FIELDS = [("size", "<u8"), ("digest", *DIGEST), ("group", *DIGEST), ("prompt", *DIGEST)]
FIELDS += [("split", "u1"), ("text", "<u8"), ("start", "<u8")]
ELSEWHERE = 2**64 - 1  # the start of a document of another part
PUBLISHED = (*SPLITS, "")  # splits by number
NUMBER = np.uint64(2**60 - 1)  # of a document: the low bits of an order, behind its
RANK = np.array([2, 1, 0, 2], np.uint64) * (NUMBER + np.uint64(1))  # by split: least is first
BLOCK = 4096  # documents that are read at a time
PAGE = 1000  # bytes; shorter documents stay whole, unless there is only one


class Document(NamedTuple):
    size: int  # bytes of UTF-8
    digest: bytes  # of its content
    group: bytes  # a digest, too: documents that are alike in it go to one split
    prompt: bytes  # likewise: they must not stand in two
    split: str  # where it was published as train, val or test; else empty
    text: int  # bytes of what is said in it: of a row, its contents without their JSON
    start: int  # its place in the spool, in bytes, or ELSEWHERE


class Index:
    """The documents in their order; of those that are alike, once it is settled, one."""

    def __init__(self, folder: Path):
        self.folder, self.read = folder, 0  # documents of which it knows
        self.entries = open(folder / "spool_index", "w+b")
        self.signatures = open(folder / "spool_signatures", "w+b")
        # 1 + the number of what each document is like, or 0; unbuffered, since single ones change
        self.like = open(folder / "spool_like", "w+b", buffering=0)
        self.size = self.count = 0  # bytes and documents that stay
        self.published: set[str] = set()  # the splits that they came in, "" if in none
        self.near = 0.0  # how alike texts were that have left
        self.crossing = False  # whether a prompt may stand in two splits
        self.digest = hashlib.sha256()  # of the whole

    def close(self) -> None:
        for file in (self.entries, self.like, self.signatures):
            file.close()
            Path(file.name).unlink()

    def add(self, document: Document, signature: np.ndarray | None) -> None:
        number = PUBLISHED.index(document.split)
        self.entries.write(ENTRY.pack(*document[:4], number, *document[5:]))
        if signature is not None:
            self.signatures.write(signature.astype("<u4").tobytes())
        self.read += 1

    def settle(self, kind: str, near: float) -> Counter:
        """Leaves out what has come before, and with `near` what is so alike; returns how many.

        A published test keeps even what it repeats, so that figures on it are those of others. Of
        texts that are nearly alike the first stays; but train leaves before a published val, and
        that before test. What is like one that has left leaves too: it is a copy of a copy.
        """
        self.near = near
        self.like.truncate(8 * self.read)  # zeros, which take no room: nobody has left
        left: Counter = Counter()
        path = self.folder / "spool_sorted"
        for later, first in duplicates.repeats(self.keys(), self.read, path):
            left["repeated"] += len(later)
            self.mark(later, first)
        if near:
            bands = duplicates.bands_of(near)
            for later, first in duplicates.repeats(self.bands(bands), self.read * bands, path):
                of_test = later <= NUMBER
                later, first = (orders[~of_test] & NUMBER for orders in (later, first))
                found = duplicates.alike(self.signatures, later, first, near)
                self.mark(later[found], first[found])
        for _, entries, like in self.blocks():
            kept = entries[like == 0]
            self.count += len(kept)
            self.size += int(kept["size"].sum())
            self.published |= {PUBLISHED[n] for n in np.unique(kept["split"]).tolist()}
            published = kept["split"] < len(SPLITS)
            grouped = (kept["group"] != kept["prompt"]).any(1)
            self.crossing = self.crossing or bool((published | grouped).any())
            # of a text, only what it is: so it is in folders that were prepared before rows were
            told = np.where(published | (kind != "text"), 57, 24).tolist()
            raw = memoryview(kept.tobytes())
            for begin, length in enumerate(told):
                begin *= ENTRY.size
                self.digest.update(raw[begin : begin + length])
        left["near-duplicate"] = self.read - self.count - left["repeated"]
        return left

    def blocks(self, most: int = BLOCK) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """The number of the first of some documents, their entries, and what each is like."""
        for number in range(0, self.read, most):
            self.entries.seek(number * ENTRY.size)
            entries = np.frombuffer(self.entries.read(most * ENTRY.size), FIELDS)
            self.like.seek(8 * number)
            yield number, entries, np.frombuffer(self.like.read(8 * len(entries)), "<u8")

    def keys(self) -> Iterator[np.ndarray]:
        """Records for `duplicates.repeats`: equal for equal documents. What is drawn may come to
        train, too, and so counts as of train; what was published as val is compared with that."""
        for number, entries, _ in self.blocks(duplicates.RUN):
            records = np.empty(len(entries), duplicates.RECORD)
            records["key"] = entries["digest"]
            records["key"][:, 1] ^= entries["split"] == PUBLISHED.index("val")
            records["order"] = np.arange(number, number + len(entries))
            yield records[entries["split"] != PUBLISHED.index("test")]

    def bands(self, count: int) -> Iterator[np.ndarray]:
        """Likewise, equal for texts that may be nearly alike."""
        for number, entries, like in self.blocks():
            size = 4 * duplicates.HASHES
            self.signatures.seek(number * size)
            signatures = np.frombuffer(self.signatures.read(len(entries) * size), "<u4")
            signatures = signatures.reshape(-1, duplicates.HASHES)
            orders = RANK[entries["split"]] + np.arange(number, number + len(entries), dtype="u8")
            yield duplicates.band_keys(signatures[like == 0], orders[like == 0], count)

    def mark(self, later: np.ndarray, first: np.ndarray) -> None:
        for number, before in zip(later.tolist(), first.tolist(), strict=True):
            self.like.seek(8 * number)
            self.like.write(struct.pack("<Q", before + 1))

    def __iter__(self) -> Iterator[Document]:
        for _, entries, like in self.blocks():
            kept = entries[like == 0].tobytes() if like.any() else entries
            for size, digest, group, prompt, number, text, start in ENTRY.iter_unpack(kept):
                yield Document(size, digest, group, prompt, PUBLISHED[number], text, start)

    def nearly_alike(self) -> Iterator[tuple[Document, Document]]:
        """Each text that has left for being nearly alike another, and that one."""
        for _, entries, like in self.blocks() if self.near else ():
            some = zip(ENTRY.iter_unpack(entries[like > 0].tobytes()), like[like > 0], strict=True)
            for left, other in some:
                self.entries.seek((int(other) - 1) * ENTRY.size)
                kept = named(ENTRY.unpack(self.entries.read(ENTRY.size)))
                if named(left).digest != kept.digest:
                    yield named(left), kept


def named(entry: tuple) -> Document:
    return Document(*entry[:4], PUBLISHED[entry[4]], *entry[5:])


def places(known: Index, kind: str, fractions: dict, seed: int) -> Callable[[Document], str]:
    """Which split a document goes to, as a function; "" stands for all of them, in order.

    Val and test that were published stay what they are. Of the others a hash decides: of the
    content, so that it is the same whatever else is there, or of a row's group or else prompt.
    `fractions` are those of val and test, by the split in which a document was published.

    But among a few novels chance would leave a split empty, or make it one novel. So a text larger
    than a split's share is cut in order at line ends, train | val | test; so is a single text of
    any size. Shorter ones than a page stay whole; where nothing is drawn for a split, it gets the
    document that came nearest. In one part of a source all of this is as it would be in the whole.
    """

    def is_cut(document: Document) -> bool:
        held_back = [f for f in fractions[document.split].values() if f]
        share = known.size * min(held_back, default=1)
        return kind == "text" and (known.count == 1 or document.size > max(share, PAGE))

    @cache
    def ends(split: str) -> tuple[float, float]:
        def draws() -> Iterator[float]:
            drawn = (d for d in known if d.split == split and not is_cut(d))
            return (draw(document.group, seed) for document in drawn)

        val, test = fractions[split]["val"], fractions[split]["test"]
        val_end, test_end = val, val + test
        first = min(draws(), default=1.0)
        second = min((u for u in draws() if u > first), default=1.0)
        if any(u > second for u in draws()):  # else nothing would be left to train on
            val_end = max(val_end, first) if val else 0.0
            nearest = min((u for u in draws() if u > val_end), default=1.0)
            test_end = max(test_end, nearest) if test else val_end
        return val_end, test_end

    def place(document: Document) -> str:
        if document.split in ("val", "test"):
            return document.split
        if is_cut(document):
            return ""
        u = draw(document.group, seed)
        val_end, test_end = ends(document.split)
        return "val" if u <= val_end else "test" if u <= test_end else "train"

    return place


def draw(digest: bytes, seed: int) -> float:
    """Uniform in [0, 1), and the same for equal documents."""
    return uniform(b"%d " % seed + digest)


def uniform(content: bytes) -> float:
    hashed = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(hashed, "big") / 2**64
