"""The shard format, and batches as a pure function of (seed, step), shared out to the ranks.

    data/<name>/   train_000000.bin ...  val_000000.bin ... meta.json  encoding.json  vocab.tiktoken

A shard is a header of 256 int32 (magic, version, number of tokens), then the tokens, all
little-endian: the layout of github.com/karpathy/llm.c and its descendants.
"""

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path

import numpy as np

from engine.files import sha256_of
from tokenizer import Tokenizer, bytes_tokenizer, published_tokenizer

HEADER_INTS = 256
FORMATS = {"<u2": (20240520, 1), "<u4": (20240801, 7)}  # token type: magic, version
SHARD_TOKENS = 100_000_000  # as in llm.c: files of 200 MB
IGNORE = -100  # a target that does not count


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


class Split:
    """All tokens of one split as if they were one array."""

    def __init__(self, paths: list[Path], text_bytes: int | None):
        self.paths, self.text_bytes = paths, text_bytes
        self.shards = [open_shard(path) for path in paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.tokens = int(self.ends[-1])

    def require(self, block_size: int) -> None:
        """Raises ValueError if the split is too short for a window of `block_size` + 1 tokens."""
        if self.tokens <= block_size:
            raise ValueError(
                f"the split {self.paths[0].parent} has {self.tokens} tokens, but a window takes"
                f" block_size + 1 = {block_size + 1}: use more text or a smaller block_size"
            )

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count as int64, fewer at the end of the split."""
        parts = []
        for shard, end in zip(self.shards, self.ends, strict=True):
            first = end - len(shard)
            if start < end and start + count > first:
                parts.append(shard[max(0, start - first) : start + count - first])
        return np.concatenate(parts).astype(np.int64)

    def batch(
        self, step: int, rows: int, block_size: int, seed: int, rank: int = 0, world: int = 1
    ):
        """Inputs and targets (rows / world, block_size), int64: one rank's share of batch `step`.

        `step` counts from 0. A global batch is the next `rows` windows of an endless sequence that
        shuffles all windows anew in each epoch: it depends on nothing but the arguments.
        """
        share = rows // world
        windows = []
        for i in range(step * rows + rank * share, step * rows + (rank + 1) * share):
            epoch, position = divmod(i, windows_per_epoch(self.tokens, block_size))
            start = epoch_order(self.tokens, block_size, seed, epoch)[position]
            windows.append(self.read(int(start), block_size + 1))
        window = np.stack(windows)
        return window[:, :-1], window[:, 1:]

    def in_order(self, rows: int, block_size: int, rank: int = 0, world: int = 1):
        """Yields inputs and targets that cover the split once, every token but the first a target.

        Consecutive windows, dealt out to the ranks in turn, at most `rows` to each at a time. The
        last ones are filled up with targets that do not count, so that all ranks get equally many.
        """
        starts = range(0, self.tokens - 1, block_size)
        for i in range(0, len(starts), rows * world):
            some = starts[i : i + rows * world]
            height = -(-len(some) // world)
            x = np.zeros((height, block_size), np.int64)
            y = np.full((height, block_size), IGNORE, np.int64)
            for row, start in enumerate(some[rank::world]):
                window = self.read(start, block_size + 1)
                x[row, : len(window) - 1], y[row, : len(window) - 1] = window[:-1], window[1:]
            yield x, y


def windows_per_epoch(tokens: int, block_size: int) -> int:
    """Windows of block_size + 1 tokens, each beginning with the last token of the one before."""
    return max(1, (tokens - block_size) // block_size)


@lru_cache(maxsize=2)  # a batch may need the end of one epoch and the beginning of the next
def epoch_order(tokens: int, block_size: int, seed: int, epoch: int) -> np.ndarray:
    """Where each window of `epoch` starts, shuffled; the first window starts at a random phase."""
    rng = np.random.default_rng((seed, epoch))
    count = windows_per_epoch(tokens, block_size)
    phase = rng.integers(min(block_size, tokens - count * block_size))
    return phase + block_size * rng.permutation(count)


class Dataset:
    """A prepared folder, or a folder of public shards if the name of their tokenizer is given.

    `files` lists the shards of each split. Raises ValueError, with the remedy, for anything missing
    or damaged.
    """

    def __init__(self, folder: str, tokenizer: str = ""):
        self.folder, meta = Path(folder), Path(folder) / "meta.json"
        remedy = f"`python prepare.py TEXT --out={folder}` prepares a text"
        if not self.folder.is_dir():
            raise ValueError(f"there is no data in {folder}: {remedy}")
        self.sha256: dict[str, str] = {}  # of each shard, where it was recorded
        self.text_bytes: dict[str, int] = {}  # of each split, likewise
        if meta.exists():
            try:
                info = json.loads(meta.read_text(encoding="utf-8"))
                expected, self.files = info["tokenizer_sha256"], {}
                for name, split in info["splits"].items():
                    self.files[name] = [str(shard["file"]) for shard in split["shards"]]
                    self.text_bytes[name] = int(split["bytes"])
                    self.sha256 |= {shard["file"]: shard["sha256"] for shard in split["shards"]}
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise ValueError(f"{meta} is damaged ({e!r}): prepare the data again") from e
            if tokenizer_digest(self.folder) != expected:
                raise ValueError(
                    f"the tokenizer files in {folder} (encoding.json, vocab.tiktoken) are damaged"
                    " or missing: prepare the data again"
                )
            self.tokenizer = Tokenizer.load(self.folder)
        elif (self.folder / "encoding.json").exists():
            raise ValueError(f"{meta} is missing: prepare the data again")
        else:
            names = sorted(path.name for path in self.folder.glob("*.bin"))
            self.files = {s: [n for n in names if s in n] for s in ("train", "val", "test")}
            if not self.files["train"]:
                raise ValueError(f"{folder} has neither meta.json nor *train*.bin: {remedy}")
            if not tokenizer:
                raise ValueError(
                    f"{folder} has no meta.json: name the vocabulary of its shards, as in"
                    " --tokenizer=gpt2"
                )
            of_bytes = tokenizer == "bytes"
            self.tokenizer = bytes_tokenizer() if of_bytes else published_tokenizer(tokenizer)

    def split(self, name: str) -> Split:
        """The split called `name`; the sizes of its shards are checked, their content is not."""
        paths = [self.folder / file for file in self.files.get(name, [])]
        if not paths:
            raise ValueError(f"{self.folder} has no {name} split: prepare it with --{name} above 0")
        for path in paths:
            if not path.exists():
                raise ValueError(f"{path} is missing: prepare the data again")
        split = Split(paths, self.text_bytes.get(name))
        split.require(1)  # one token to read, one to predict
        return split

    def verify(self) -> str:
        """Reads all shards and returns a digest of the whole: equal digests mean equal data."""
        whole = hashlib.sha256(self.tokenizer.digest().encode())
        for split in [self.split(name) for name, files in self.files.items() if files]:
            for path, shard in zip(split.paths, split.shards, strict=True):
                found = sha256_of(path)
                if found != self.sha256.get(path.name, found):
                    raise ValueError(f"{path} is damaged: its sha256 is not the recorded one")
                if path.name not in self.sha256 and shard.max() >= self.tokenizer.vocab_size:
                    raise ValueError(
                        f"{path} holds token {shard.max()}, but the vocabulary "
                        f"{self.tokenizer.name} ends at {self.tokenizer.vocab_size - 1}"
                    )
                whole.update(found.encode())
        return whole.hexdigest()
