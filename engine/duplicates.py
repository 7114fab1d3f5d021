"""Which documents have come before, exactly or nearly, in a memory that does not grow with them.

**Exactly.** Digests of all documents do not fit into memory, so they are sorted on disk: as they
come, in runs of RUN; then a range of digests at a time, about AT_ONCE, is gathered from all runs.
Equal ones meet there, and the first of them stays.

**Nearly.** Two texts are as alike as their sets of shingles, which are all runs of five words, A
and B: s = |A ∩ B| / |A ∪ B| (Jaccard). Hash all shingles of both, and the least value belongs to
one that both have, so that it is the same for both, with probability s. HASHES such minima are a
signature; the share in which two agree estimates s, give or take sqrt(s (1 - s) / HASHES) (Broder
1997, MinHash). Whom to compare, among millions? A signature is cut into b bands of r values, and
only texts that agree in a whole band meet, which those of likeness s do with probability

    1 - (1 - s^r)^b        r = 8, b = 16:    s = 0.5  0.06    0.7  0.61    0.8  0.95    0.9  1.00

(Leskovec, Rajaraman, Ullman 2020, section 3.4). A band is a key of 64 bits: equal ones are found
as equal digests are. Of all that meet in a band, each is compared with the first of its run, and
the firsts of the runs with the first of all: so RUN is part of what is found.
"""

import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import regex

RUN = 1 << 16  # records that are sorted as they come
AT_ONCE = 1 << 17  # records of all runs that are compared at a time
PAIRS = 1 << 10  # signatures that are compared at a time
RECORD = np.dtype([("key", "<u8", 2), ("order", "<u8")])
SHINGLE = 5  # words
HASHES = 128  # values of a signature
NONE = 2**32 - 1  # the values of a text without shingles
# Scripts that write no spaces: each of their characters counts as a word, and 模型 is two.
ALONE = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
WORD = regex.compile(rf"(?V1)[{ALONE}]|[\w--[{ALONE}]]+")
ASCII_WORD = re.compile(r"\w+")  # the same where there is nothing else, and three times as fast
ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / the golden ratio: multiplied by it, bits spread


def repeats(
    blocks: Iterable[np.ndarray], most: int, path: Path
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of orders, (later, first): of records with equal keys each but the one of least order.

    `blocks` are arrays of RECORD, at most `most` records in all. `path` is a file to work in. Keys
    should be digests, so that ranges of them hold about equally many. What comes twice within a run
    is told at once and goes no further: so not even a million equal ones are gathered.
    """
    ranges = -(-most // AT_ONCE)
    # of each run: at which record of the file each range of keys begins. Of 100 million, 9 MB
    edges = []
    with open(path, "w+b") as file:
        for block in blocks:
            for i in range(0, len(block), RUN):
                run, later, first = unique(block[i : i + RUN])
                yield later, first
                number = (run["key"][:, 0] >> 32) * np.uint64(ranges) >> 32  # of its range
                begin = file.tell() // RECORD.itemsize
                edges.append(begin + np.searchsorted(number, np.arange(ranges + 1)))
                file.write(run.tobytes())
        for k in range(ranges if len(edges) > 1 else 0):
            gathered = []
            for begin, end in (edge[k : k + 2].tolist() for edge in edges):
                file.seek(begin * RECORD.itemsize)
                gathered.append(file.read((end - begin) * RECORD.itemsize))
            _, later, first = unique(np.frombuffer(b"".join(gathered), RECORD))
            yield later, first
    path.unlink()


def unique(records: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first record of each key, in order of keys; the orders of the others, and of the first
    record that each of these repeats."""
    key = records["key"]
    records = records[np.lexsort((records["order"], key[:, 1], key[:, 0]))]
    new = np.ones(len(records), bool)
    new[1:] = (records["key"][1:] != records["key"][:-1]).any(1)
    order = records["order"]
    first = order[new][new.cumsum() - 1]
    return records[new], order[~new], first[~new]


class Shingles:
    """The signature of a text that comes in pieces."""

    draw = np.random.default_rng(0).integers(2**64, size=(2, HASHES), dtype=np.uint64)
    factor, summand = draw[0] | np.uint64(1), draw[1]  # of each hash

    def __init__(self):
        self.least = np.full(HASHES, NONE, np.uint32)
        self.words = np.zeros(0, np.uint64)  # hashes of the last ones, which a shingle may join

    def feed(self, piece: str) -> None:
        words = (ASCII_WORD if piece.isascii() else WORD).findall(piece.lower())
        new = np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint64, len(words))
        words = np.concatenate([self.words, new])
        self.words = words[-(SHINGLE - 1) :]
        count = len(words) - SHINGLE + 1
        shingles = np.zeros(max(count, 0), np.uint64)
        for i in range(SHINGLE if count > 0 else 0):
            shingles = mixed(shingles + words[i : i + count])
        self.add(shingles)

    def add(self, shingles: np.ndarray) -> None:
        """Takes hashes of shingles (N), 64 bits that are as good as random."""
        for i in range(0, len(shingles), 4096):
            values = (shingles[i : i + 4096, None] * self.factor + self.summand) >> np.uint64(32)
            self.least = np.minimum(self.least, values.min(0).astype(np.uint32))


def mixed(x: np.ndarray) -> np.ndarray:
    """64 bits in which each depends on all that came in: half of the finaliser of MurmurHash3."""
    x = (x ^ x >> np.uint64(33)) * ODD
    return x ^ x >> np.uint64(29)


def bands_of(near: float) -> int:
    """Into how many bands signatures are cut, for texts of likeness `near` to meet nine times in
    ten, and others as rarely as possible."""
    rows = (HASHES >> i for i in range(HASHES.bit_length()))
    return next(HASHES // r for r in rows if 1 - (1 - near**r) ** (HASHES // r) >= 0.9)


def band_keys(signatures: np.ndarray, orders: np.ndarray, bands: int) -> np.ndarray:
    """A record for each band of the signatures (N, HASHES) that have shingles."""
    some = signatures[:, 0] != NONE
    cut = signatures[some].reshape(-1, bands, HASHES // bands).astype(np.uint64)
    records = np.empty(cut.shape[:2], RECORD)
    records["key"] = np.arange(bands)[None, :, None]
    key = np.zeros(cut.shape[:2], np.uint64)
    for i in range(cut.shape[2]):
        key = mixed(key * ODD + cut[:, :, i])
    records["key"][..., 0] = key
    records["order"] = orders[some, None]
    return records.reshape(-1)


def alike(file: BinaryIO, a: np.ndarray, b: np.ndarray, near: float) -> np.ndarray:
    """Which of the pairs have signatures, by number in the file, that agree in a share `near`."""

    def read(number: int) -> bytes:
        file.seek(4 * HASHES * number)
        return file.read(4 * HASHES)

    found = [np.zeros(0, bool)]
    for i in range(0, len(a), PAIRS):
        some = [b"".join(map(read, numbers[i : i + PAIRS].tolist())) for numbers in (a, b)]
        x, y = (np.frombuffer(data, "<u4").reshape(-1, HASHES) for data in some)
        found.append((x == y).mean(1) >= near)
    return np.concatenate(found)
