"""Which windows of the text each step learns from: a pure function of (seed, step).

    data/<name>/   train_000000.bin ...  val_000000.bin ... meta.json  encoding.json  vocab.tiktoken

**Running text.** The tokens of a split are one long strip, in files that engine/shards.py opens. A
model learns from windows of block_size + 1 tokens. Twenty tokens, for a block_size of 4:

    tokens             0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15 16 17 18 19
    epoch 0, phase 2         |-----A-----|-----B-----|-----C-----|-----D-----|
    epoch 1, phase 0   |-----A-----|-----B-----|-----C-----|-----D-----|

    (seed 5: first A D B C, then C A B D)

The first window to be learned from is 2 3 4 5 6. Its inputs are 2 3 4 5 and its targets, moved by
one, 3 4 5 6: after 2 comes 3, after 2 3 comes 4, and so on: four exercises in one pass.

Neighbours share their border token: it is the last target of one and the first input of the next,
so every token of the windows but the very first is a target once. Each epoch begins at another
random phase, so that the cuts fall elsewhere, and takes its windows in another random order.
If each window were drawn at random instead, an epoch's worth of draws would miss a third of them
(1/e).

**Rows**, such as questions with their answers, are not cut. A window is packed with whole ones, all
of one task, and filled up with end-of-text (.):

    tokens     u q q e a A A e . u q e a A e . .       u, a, e: <|user|>, <|assistant|>, <|end|>
    row        0 0 0 0 0 0 0 0 0 1 1 1 1 1 1 1 2       no row sees another: see `layout`
    position   0 1 2 3 4 5 6 7 8 0 1 2 3 4 5 6 0
    target     - - - - A A e - - - - - A e - - -       only answers are to be learned

Nothing of this is state to be saved. The update of step 1000 with 32 rows learns from windows
999 * 32 = 31,968 to 31,999 of the endless sequence of epochs (999 updates came before). If an epoch
has 9,000, that is epoch 31,968 // 9,000 = 3, positions 31,968 - 3 * 9,000 = 4,968 to 4,999 in the
order that (seed, 3) gives. Rank 1 of 4 takes the second eight. `--show_batch=1000` prints them.
With several tasks, the number of a window also decides which task it is of: see `turns` in
engine/packing.py.
"""

import hashlib
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.packing import IGNORE, Documents, Rows, describe, shares, tasks_of, turns
from engine.prepared import Folder
from engine.shards import Strip, open_shard, split_of
from tokenizer import Markers, Tokenizer


class Batch(NamedTuple):
    """B windows of T tokens. Positions and mask are None for running text: 0 to T - 1, causal."""

    tokens: np.ndarray  # (B, T) int64
    targets: np.ndarray  # (B, T) int64: the token that comes next, IGNORE where it does not count
    positions: np.ndarray | None = None  # (B, T) int64
    mask: np.ndarray | None = None  # (B, 1, T, T) bool, True where a position (row) sees another
    keys: list[tuple] | None = None  # of each (seed, number): seeds what is random in it

    def windows(self, start: int, end: int) -> "Batch":
        """Some of the windows."""
        return Batch(*(z if z is None else z[start:end] for z in self))


def layout(tokens: np.ndarray, markers: Markers, policy: str) -> tuple[np.ndarray, np.ndarray]:
    """Who may see whom, read off the tokens (B, T): positions (B, T) and mask (B, 1, T, T).

    After each end-of-text begins another row: it sees nothing of the others, and its positions
    count from 0. Within a row, by `policy`: "causal", each token sees itself and those before;
    "full", all of them; "prefix", the prompt sees itself whole, since it is given and nobody has to
    predict it, and what comes after the first `<|assistant|>` is causal (Raffel et al. 2020,
    section 3.2.1). For u q a A e:

        causal  u 1 0 0 0 0    prefix  u 1 1 1 0 0    full  u 1 1 1 1 1
                q 1 1 0 0 0            q 1 1 1 0 0          q 1 1 1 1 1
                a 1 1 1 0 0            a 1 1 1 0 0          a 1 1 1 1 1
                A 1 1 1 1 0            A 1 1 1 1 0          A 1 1 1 1 1
                e 1 1 1 1 1            e 1 1 1 1 1          e 1 1 1 1 1
    """
    at = np.arange(tokens.shape[1])
    begins = first_of_row(tokens, markers)
    row = begins.cumsum(1) - 1  # 0 0 0 1 1 ...
    positions = at - np.maximum.accumulate(np.where(begins, at, 0), axis=1)
    mask = row[:, :, None] == row[:, None, :]
    if policy == "full":
        return positions, mask[:, None]
    sees = at[:, None] >= at
    if policy == "prefix":
        # the prompt: as yet no <|assistant|> in this row, and the next one is in it
        answers = tokens == markers.assistant
        before = answers.cumsum(1) - answers
        none_yet = before == np.maximum.accumulate(np.where(begins, before, 0), axis=1)
        rows_ahead = np.where(answers, row, tokens.shape[1] + 1)[:, ::-1]
        prompt = none_yet & (np.minimum.accumulate(rows_ahead, axis=1)[:, ::-1] == row)
        sees = sees | (prompt[:, :, None] & prompt[:, None, :])
    mask &= sees  # in place: it is the largest array here
    return positions, mask[:, None]


def counted(tokens: np.ndarray, markers: Markers, train_on: str) -> np.ndarray:
    """Which tokens of packed windows are to be predicted, (B, T) bool: those of "answers", from
    behind `<|assistant|>` to its `<|end|>`, or "all" of a row but its first marker."""
    if train_on == "all":
        return ~first_of_row(tokens, markers)
    at = np.arange(tokens.shape[1])
    begun = np.maximum.accumulate(np.where(tokens == markers.assistant, at, -1), axis=1)
    ended = np.maximum.accumulate(np.where(tokens == markers.end, at, -1), axis=1)
    inside = np.zeros(tokens.shape, bool)
    inside[:, 1:] = begun[:, :-1] > ended[:, :-1]  # by what stands before
    return inside


def first_of_row(tokens: np.ndarray, markers: Markers) -> np.ndarray:
    begins = np.ones(tokens.shape, bool)
    begins[:, 1:] = tokens[:, :-1] == markers.end_of_text
    return begins


class Text:
    """Running text as a part of a split: its windows are cut anew in each epoch.

    Windows go by where they start. `Rows` in engine/packing.py, the rows of one task, has the same
    methods; there windows are lists of rows.
    """

    kind, task = "text", "text"

    def __init__(self, strip: Strip):
        self.strip = strip
        self.epoch = lru_cache(maxsize=2)(self.epoch)  # a batch may need parts of two

    def per_epoch(self, block_size: int, seed: int) -> int:
        """The number of windows that are learned from in an epoch."""
        return windows_per_epoch(self.strip.tokens, block_size)

    def epoch(self, number: int, block_size: int, seed: int) -> np.ndarray:
        """Where the windows of this epoch start, in its order."""
        return epoch_order(self.strip.tokens, block_size, seed, number)

    def in_order(self, block_size: int) -> range:
        """The windows that cover all of it once, for evaluation; the last one may be short."""
        return range(0, self.strip.tokens - 1, block_size)

    def read(self, window: int, block_size: int) -> np.ndarray:
        """The (block_size + 1) tokens of a window; IGNORE is what a short one lacks."""
        tokens = self.strip.read(int(window), block_size + 1)
        lacks = np.full(block_size + 1 - len(tokens), IGNORE)
        return np.concatenate([tokens, lacks])

    def require(self, block_size: int) -> None:
        """Raises ValueError if there is too little for a window."""
        if self.strip.tokens <= block_size:
            path = self.strip.paths[0]
            raise ValueError(
                f"the {split_of(path.name)} split of {path.parent} has {self.strip.tokens} tokens,"
                f" but a window takes block_size + 1 = {block_size + 1}: use more text or a"
                " smaller block_size"
            )


def windows_per_epoch(tokens: int, block_size: int) -> int:
    """Windows of block_size + 1 tokens, each beginning with the last token of the one before."""
    return max(1, (tokens - block_size) // block_size)


def epoch_order(tokens: int, block_size: int, seed: int, epoch: int) -> np.ndarray:
    """Where each window of `epoch` starts, shuffled; the first one starts at a random phase, any
    that leaves room for all of them. So in some epoch each token but the first is a target."""
    rng = np.random.default_rng((seed, epoch))
    count = windows_per_epoch(tokens, block_size)
    phase = rng.integers(tokens - count * block_size)
    return phase + block_size * rng.permutation(count)


class Split:
    """One split of a data set: what there is to learn from, or to be tested on.

    `text_bytes` is the size of its text, None where it is not known or not all is text. `mask` is
    the policy of `layout`, `train_on` that of `counted`, `mix` that of `shares`. With `lines`, each
    window holds one row, or one document of a text, and no more; it is as long as the longest.
    """

    def __init__(
        self,
        strips: list[Strip],
        tokenizer: Tokenizer | None = None,
        mask: str = "causal",
        train_on: str = "answers",
        mix: str = "",
        lines: bool = False,
    ):
        self.strips, self.tokenizer, self.lines = strips, tokenizer, lines
        self.mask, self.train_on, self.mix = mask, train_on, mix
        self.tokens = sum(strip.tokens for strip in strips)
        sizes = [strip.text_bytes if strip.kind == "text" else None for strip in strips]
        self.text_bytes = None if None in sizes else sum(sizes)
        self.parts: list[Text | Rows] = []
        for strip in strips:
            if strip.kind != "text":
                self.parts += tasks_of(strip, tokenizer, lines)
            else:
                self.parts.append(Documents(strip, tokenizer.end_of_text) if lines else Text(strip))

    def require(self, block_size: int) -> None:
        """Raises ValueError if a part has nothing for a window of `block_size` + 1 tokens, or the
        mix cannot be."""
        shares([(part.task, 1) for part in self.parts], self.mix)
        for part in self.parts:
            part.require(block_size)

    def describe(self, block_size: int, seed: int) -> str:
        """One line about how rows are packed, and what they lose; empty for windows of text."""
        if self.lines and self.parts[0].kind == "text":
            return self.parts[0].describe(block_size)
        parts = [part for part in self.parts if part.kind != "text"]
        return describe(parts, block_size, seed) if parts else ""

    def batch(
        self, step: int, rows: int, block_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> Batch:
        """One rank's share of batch `step`: `rows` / `world` windows of `block_size` tokens.

        `step` counts from 0. A global batch is the next `rows` windows of an endless sequence that
        shuffles all windows anew in each epoch: it depends on nothing but the arguments.
        """
        share = rows // world
        first = step * rows + rank * share
        sizes = [(part.task, part.per_epoch(block_size, seed)) for part in self.parts]
        windows = []
        # window `number` of part k, counted over all epochs
        for k, number in turns(shares(sizes, self.mix), first, first + share):
            part = self.parts[k]
            _, size = sizes[k]
            epoch, position = divmod(number, size)
            window = part.epoch(epoch, block_size, seed)[position]
            windows.append((part, part.read(window, block_size)))
        keys = [(seed, number) for number in range(first, first + share)]
        return self.of(windows)._replace(keys=keys)

    def in_order(
        self, rows: int, block_size: int, rank: int = 0, world: int = 1, most: int = 0
    ) -> Iterator[Batch]:
        """Yields batches that cover the split once; of text, every token but the first is a target.

        Consecutive windows, dealt out to the ranks in turn, at most `rows` to each at a time. The
        last ones are filled up with targets that do not count, so that all ranks get equally many.
        `most` targets, if above 0, are enough: then windows are left out, evenly.
        """
        parts = [(part, part.in_order(block_size)) for part in self.parts]
        chosen = range(sum(len(windows) for _, windows in parts))
        if 0 < most < self.tokens - 1:
            kept = min(len(chosen), max(1, most // block_size))
            chosen = [chosen[i * len(chosen) // kept] for i in range(kept)]

        def read(number: int) -> tuple[Text | Rows, np.ndarray]:
            for part, windows in parts:
                if number < len(windows):
                    return part, part.read(windows[number], block_size)
                number -= len(windows)

        for i in range(0, len(chosen), rows * world):
            some = chosen[i : i + rows * world]
            mine = [read(number) for number in some[rank::world]]
            part, like = mine[0] if mine else read(some[0])
            nothing = part, np.full_like(like, IGNORE)
            yield self.of(mine + [nothing] * (-(-len(some) // world) - len(mine)))

    def of(self, windows: list[tuple[Text | Rows, np.ndarray]]) -> Batch:
        """A batch of these windows, (block_size + 1) tokens each, IGNORE where there is none."""
        tokens = np.stack([window for _, window in windows])
        if self.lines:
            tokens = tokens[:, : self.longest(tokens)]
        y = tokens[:, 1:]
        x = np.where(tokens[:, :-1] == IGNORE, 0, tokens[:, :-1])
        packed = np.array([part.kind != "text" for part, _ in windows])[:, None]
        if not packed.any():
            return Batch(x, y)
        markers, at = self.tokenizer.markers, np.arange(x.shape[1])
        targets = counted(tokens, markers, self.train_on)[:, 1:] | ~packed
        positions, mask = layout(x, markers, self.mask)
        if not packed.all():
            positions = np.where(packed, positions, at)
            mask = np.where(packed[:, :, None, None], mask, at[:, None] >= at)  # text is causal
        return Batch(x, np.where(targets, y, IGNORE), positions, mask)

    def longest(self, tokens: np.ndarray) -> int:
        """How many tokens the longest line has; what comes behind the end of each fills it up."""
        used = (tokens != IGNORE) & (tokens != self.tokenizer.end_of_text)
        return int(used.any(axis=0).nonzero()[0].max(initial=0)) + 2

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count of the split, int64."""
        return self.whole.read(start, count)

    @cached_property
    def whole(self) -> Strip:
        """All its shards, one after the other."""
        return Strip([path for strip in self.strips for path in strip.paths])

    def rows(self) -> Iterator[list[int]]:
        """The ids of each row, in the order in which they were prepared."""
        for strip in self.strips:
            if strip.kind != "text":
                for place in strip.rows(self.tokenizer.end_of_text)[0].tolist():
                    yield strip.read(*place).tolist()

    def bytes_of(self, tokens: np.ndarray) -> int:
        """How many bytes of text some of its tokens stand for; an end-of-text has none."""
        text = tokens[tokens != self.tokenizer.end_of_text]
        return len(self.tokenizer.decode_bytes(text.tolist()))


class Dataset:
    """A prepared folder, several joined by commas, or one of public shards, whose tokenizer has to
    be named.

    Of several, all running text is one strip, in the order in which they are named: so the windows
    of a text that was prepared in parts go across their borders. Each vocabulary has to be equal to
    the largest or extended by it. `kind` is "pairs" if they hold pairs, "rows" if any holds rows,
    else "text". Raises ValueError, with the remedy, for anything missing or damaged.
    """

    def __init__(
        self,
        folder: str,
        tokenizer: str = "",
        mask: str = "causal",
        train_on: str = "answers",
        mix: str = "",
        lines: bool = False,
    ):
        if mask == "prefix" and train_on == "all":
            raise ValueError(
                "mask='prefix' lets a prompt see itself whole, so nothing is learned by predicting"
                " it: use train_on='answers', or mask='causal'"
            )
        self.folder = folder
        self.learning = dict(mask=mask, train_on=train_on, mix=mix, lines=lines)
        self.split = lru_cache(self.split)  # one for all who ask: its rows are packed once
        self.folders = [Folder(name) for name in folder.split(",")]
        kinds = {f.kind for f in self.folders}
        if "pairs" in kinds and len(kinds) > 1:
            raise ValueError(f"{folder} holds pairs and something else: learn from one at a time")
        self.kind = next(kind for kind in ("pairs", "rows", "text") if kind in kinds)
        found = [f.tokenizer(tokenizer) for f in self.folders]
        self.tokenizer = max(found, key=lambda t: t.vocab_size)
        for f, theirs in zip(self.folders, found, strict=True):
            if not self.tokenizer.extends(theirs):
                largest = self.folders[found.index(self.tokenizer)].path
                raise ValueError(
                    f"{f.path} is written in another vocabulary than {largest}: prepare it anew,"
                    f" with --tokenizer={largest}"
                )

    def require_tokenizer(self, tokenizer: Tokenizer, run: str, grows: bool = False) -> None:
        """Raises ValueError, with the command that mends it, if the model `run` reads other ids; if
        it `grows`, it may lack those that came last."""
        ours = self.tokenizer
        if not (ours.extends(tokenizer) if grows else tokenizer.extends(ours)):
            folder = self.folders[0]
            out = f"{folder.path}-{Path(run).name}"
            raise ValueError(
                f"{run} reads {tokenizer.name} ({tokenizer.vocab_size} tokens), but {self.folder}"
                f" is written in {ours.name} ({ours.vocab_size} tokens). For data in the model's"
                f" own, `{folder.command(f'--tokenizer={run}', f'--out={out}')}`, then --data={out}"
            )

    def split(self, name: str) -> Split:
        """The split called `name`; the sizes of its shards are checked, their content is not."""
        strips, joined = [], {}
        for folder in self.folders:
            if folder.paths(name):
                whole = "text" if folder.kind == "text" else folder
                joined.setdefault(whole, []).append(folder)
        for some in joined.values():
            sizes = [folder.text_bytes.get(name) for folder in some]
            paths = [path for folder in some for path in folder.paths(name)]
            strips.append(Strip(paths, some[0].kind, None if None in sizes else sum(sizes)))
        if not strips:
            raise ValueError(f"{self.folder} has no {name} split: prepare it with --{name} above 0")
        split = Split(strips, self.tokenizer, **self.learning)
        for part in split.parts:
            if isinstance(part, Text):
                part.require(1)  # one token to read, one to predict
        return split

    def verify(self) -> str:
        """Reads all shards and returns a digest of the whole: equal digests mean equal data."""
        whole = hashlib.sha256(self.tokenizer.digest().encode())
        for folder in self.folders:
            for path in (path for name in folder.files for path in folder.paths(name)):
                whole.update(folder.verify(path).encode())
                shard = open_shard(path)
                if folder.public and shard.max() >= self.tokenizer.vocab_size:
                    raise ValueError(
                        f"{path} holds token {shard.max()}, but the vocabulary "
                        f"{self.tokenizer.name} ends at {self.tokenizer.vocab_size - 1}"
                    )
        return whole.hexdigest()
