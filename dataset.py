"""Batches as a pure function of (seed, step), shared out to the ranks.

    data/<name>/   train_000000.bin ...  val_000000.bin ... meta.json  encoding.json  vocab.tiktoken

The tokens of a split are one long strip, in files that engine/shards.py opens. A model learns from
windows of block_size + 1 tokens. Twenty tokens in windows for a block_size of 4:

    tokens             0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15 16 17 18 19
    epoch 0, phase 2         |-----A-----|-----B-----|-----C-----|-----D-----|
    epoch 1, phase 0   |-----A-----|-----B-----|-----C-----|-----D-----|

    (seed 5: first A D B C, then C A B D)

The first window to be learned from is 2 3 4 5 6. Its inputs are 2 3 4 5 and its targets, moved by
one, 3 4 5 6: after 2 comes 3, after 2 3 comes 4, and so on: four exercises in one pass.

Neighbours share their border token: it is the last target of one and the first input of the next,
so every token of the windows but the very first is a target once. Each epoch begins at another
random phase, so that the cuts fall elsewhere, and takes its windows in another random order.
Without replacement: drawn at random each time, after as many windows as there are a third (1/e)
would not have been seen at all.

Nothing of this is state to be saved. The update of step 1000 with 32 rows learns from windows
999 * 32 = 31,968 to 31,999 of the endless sequence of epochs (999 updates came before). If an epoch
has 9,000, that is epoch 31,968 // 9,000 = 3, positions 31,968 - 3 * 9,000 = 4,968 to 4,999 in the
order that (seed, 3) gives. Rank 1 of 4 takes the second eight. `--show_batch=1000` prints them.
"""

import hashlib
import json
import shlex
from functools import lru_cache
from pathlib import Path

import numpy as np

from engine.files import sha256_of
from engine.shards import ShardWriter, open_shard, split_of, tokenizer_digest
from tokenizer import Tokenizer, find_tokenizer

__all__ = ["Dataset", "ShardWriter", "Split"]
IGNORE = -100  # a target that does not count


class Split:
    """All tokens of one split as if they were one array."""

    def __init__(
        self, paths: list[Path], text_bytes: int | None, tokenizer: Tokenizer | None = None
    ):
        self.paths, self.text_bytes, self.tokenizer = paths, text_bytes, tokenizer
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

    def bytes_of(self, tokens: np.ndarray) -> int:
        """How many bytes of text some of its tokens stand for; an end-of-text has none."""
        text = tokens[tokens != self.tokenizer.end_of_text]
        return len(self.tokenizer.decode_bytes(text.tolist()))

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

    def in_order(self, rows: int, block_size: int, rank: int = 0, world: int = 1, most: int = 0):
        """Yields inputs and targets that cover the split once, every token but the first a target.

        Consecutive windows, dealt out to the ranks in turn, at most `rows` to each at a time. The
        last ones are filled up with targets that do not count, so that all ranks get equally many.
        `most` targets, if above 0, are enough: then windows are left out, evenly.
        """
        starts = range(0, self.tokens - 1, block_size)
        if 0 < most < self.tokens - 1:
            kept = max(1, most // block_size)
            starts = [starts[i * len(starts) // kept] for i in range(kept)]
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
        self.made = dict(source=["TEXT"])  # the settings it was prepared with, if they are known
        if meta.exists():
            try:
                info = json.loads(meta.read_text(encoding="utf-8"))
                expected, self.files = info["tokenizer_sha256"], {}
                for name, split in info["splits"].items():
                    self.files[name] = [Path(shard["file"]).name for shard in split["shards"]]
                    self.text_bytes[name] = int(split["bytes"])
                    self.sha256 |= {shard["file"]: shard["sha256"] for shard in split["shards"]}
                self.made |= info["settings"]
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise ValueError(f"{meta} is damaged ({e!r}): prepare the data again") from e
            if tokenizer_digest(self.folder) != expected:
                raise ValueError(
                    f"the tokenizer files in {folder} (encoding.json, vocab.tiktoken) are damaged"
                    " or missing: prepare the data again"
                )
            self.tokenizer = Tokenizer.load(self.folder)
            if tokenizer and find_tokenizer(tokenizer).digest() != self.tokenizer.digest():
                raise ValueError(
                    f"tokenizer={tokenizer!r} is not that of {folder}, which has its own: leave it"
                    " out"
                )
        elif (self.folder / "encoding.json").exists():
            raise ValueError(f"{meta} is missing: prepare the data again")
        else:
            names = sorted(path.name for path in self.folder.glob("*.bin"))
            splits = ("train", "val", "test")
            self.files = {s: [n for n in names if split_of(n) == s] for s in splits}
            if not self.files["train"]:
                raise ValueError(f"{folder} has neither meta.json nor *_train_*.bin: {remedy}")
            if not tokenizer:
                raise ValueError(
                    f"{folder} has no meta.json: name the vocabulary of its shards, as in"
                    " --tokenizer=gpt2"
                )
            self.tokenizer = find_tokenizer(tokenizer)

    def require_tokenizer(self, tokenizer: Tokenizer, run: str) -> None:
        """Raises ValueError, with the command that mends it, if the model `run` reads other ids."""
        ours = self.tokenizer
        if ours.digest() == tokenizer.digest():
            return
        out = f"{self.folder}-{Path(run).name}"
        sources = ["TEXT" if source == "-" else str(source) for source in self.made["source"]]
        kept = ("val", "test", "pattern", "field", "encoding", "seed")
        other = [f"--{key}={self.made[key]}" for key in kept if key in self.made]
        command = [*sources, *other, f"--tokenizer={run}", f"--out={out}"]
        raise ValueError(
            f"{run} reads {tokenizer.name} ({tokenizer.vocab_size} tokens), but {self.folder} is"
            f" written in {ours.name} ({ours.vocab_size} tokens). For data in the model's own,"
            f" `python prepare.py {shlex.join(command)}`, then --data={out}"
        )

    def split(self, name: str) -> Split:
        """The split called `name`; the sizes of its shards are checked, their content is not."""
        paths = [self.folder / file for file in self.files.get(name, [])]
        if not paths:
            raise ValueError(f"{self.folder} has no {name} split: prepare it with --{name} above 0")
        for path in paths:
            if not path.exists():
                raise ValueError(f"{path} is missing: prepare the data again")
        split = Split(paths, self.text_bytes.get(name), self.tokenizer)
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
