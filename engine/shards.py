"""The files of a data set: written, opened and recognised. A shard is a header of 256 int32 (magic,
version, number of tokens), then the tokens, all little-endian: the layout of llm.c."""

import hashlib
import os
import re
from pathlib import Path

import numpy as np

from engine.files import sha256_of

HEADER_INTS = 256
FORMATS = {"<u2": (20240520, 1), "<u4": (20240801, 7)}  # token type: magic, version
SHARD_TOKENS = 100_000_000  # as in llm.c: files of 200 MB
WORDS = dict(train="train", val="val", valid="val", validation="val", test="test")


def split_of(name: str) -> str | None:
    """The split that a public shard belongs to: fineweb_val_000000.bin is of val, and of train is
    retrieval_train_000000.bin, since only whole words count, the last of them most."""
    words = [word for word in re.split("[^a-z]+", name.lower()) if word in WORDS]
    return WORDS[words[-1]] if words else None


def tokenizer_digest(folder: Path) -> str:
    """What `Tokenizer.digest` gives for the tokenizer stored in `folder`, without parsing it."""
    files = [folder / "encoding.json", folder / "vocab.tiktoken"]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files if f.exists())).hexdigest()


class ShardWriter:
    """Writes the tokens of one split, starting a new shard every SHARD_TOKENS."""

    def __init__(self, folder: Path, split: str, vocab_size: int):
        self.folder, self.split = folder, split
        self.dtype = "<u2" if vocab_size <= 2**16 else "<u4"
        self.shards: list[dict] = []  # file, tokens, sha256 of each finished shard
        self.file, self.room = None, 0

    def write(self, tokens: np.ndarray) -> None:
        while len(tokens):
            if not self.room:
                self.close()
                name = f"{self.split}_{len(self.shards):06d}.bin"
                self.file, self.room = open(self.folder / name, "wb"), SHARD_TOKENS
                self.file.write(bytes(4 * HEADER_INTS))
            part, tokens = tokens[: self.room], tokens[self.room :]
            self.file.write(part.astype(self.dtype).tobytes())
            self.room -= len(part)

    def close(self) -> None:
        """Completes the header of the open shard, now that its number of tokens is known."""
        if self.file is None:
            return
        count = SHARD_TOKENS - self.room
        self.file.seek(0)
        self.file.write(np.array([*FORMATS[self.dtype], count], "<i4").tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        path = Path(self.file.name)
        self.shards.append(dict(file=path.name, tokens=count, sha256=sha256_of(path)))
        self.file, self.room = None, 0


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, memory-mapped. Raises ValueError if it is not whole."""
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", count=3)
    for dtype, signature in FORMATS.items():
        if len(header) == 3 and tuple(header[:2]) == signature and header[2] > 0:
            expected = 4 * HEADER_INTS + int(header[2]) * np.dtype(dtype).itemsize
            if size != expected:
                raise ValueError(f"{path} is damaged: {size} bytes instead of {expected}")
            return np.memmap(path, dtype, mode="r", offset=4 * HEADER_INTS)
    raise ValueError(f"{path} is damaged or no shard: its header has no known magic and version")


class Strip:
    """All tokens of one split of a folder as if they were one array."""

    def __init__(self, paths: list[Path], kind: str = "text", text_bytes: int | None = None):
        self.paths, self.kind, self.text_bytes = paths, kind, text_bytes
        self.shards = [open_shard(path).view(np.ndarray) for path in paths]  # faster to slice
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.tokens = int(self.ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count as int64, fewer at the end of the split."""
        parts = []
        for shard, end in zip(self.shards, self.ends, strict=True):
            first = end - len(shard)
            if start < end and start + count > first:
                parts.append(shard[max(0, start - first) : start + count - first])
        return np.concatenate(parts).astype(np.int64)

    def rows(self, end_of_text: int) -> tuple[np.ndarray, np.ndarray]:
        """Where each row begins and how many tokens it has, (N, 2), and its first token, (N)."""
        shards = list(zip(self.shards, [0, *self.ends[:-1].tolist()], strict=True))
        ends = [np.flatnonzero(shard == end_of_text) + first for shard, first in shards]
        ends = np.concatenate(ends) + 1
        starts = np.concatenate([[0], ends[:-1]])
        tokens = []
        for shard, first in shards:
            here = starts[(first <= starts) & (starts < first + len(shard))]
            tokens.append(shard[here - first])
        return np.stack([starts, ends - starts], axis=1), np.concatenate(tokens)
