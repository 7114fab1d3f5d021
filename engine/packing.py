"""Rows into windows, and tasks in turn: what dataset.py needs so that few positions stay empty."""

import difflib
import re
from collections import Counter
from functools import lru_cache

import numpy as np

from engine.shards import Strip
from tokenizer import Markers, Tokenizer

IGNORE = -100  # a target that does not count: cross_entropy's own convention


class Rows:
    """The rows of one task as a part of a split: they are packed into windows, once for all.

    Windows are lists of rows, by number. The methods are those of `Text` in dataset.py.
    """

    kind = "rows"
    room = 1  # windows of block_size + 1 tokens that one takes

    def __init__(self, strip: Strip, task: str, places: np.ndarray, markers: Markers | None):
        self.strip, self.task, self.markers = strip, task, markers
        self.fill = markers.end_of_text if markers else IGNORE
        self.places = places  # where each row begins and how many tokens it has, (N, 2)
        self.lengths = lru_cache(self.lengths)
        self.windows = lru_cache(self.windows)
        self.epoch = lru_cache(maxsize=2)(self.epoch)  # a batch may need parts of two

    def row(self, i: int, block_size: int) -> np.ndarray:
        return fit(self.strip.read(*self.places[i]), block_size + 1, self.markers)

    def lengths(self, block_size: int) -> np.ndarray:
        """How many tokens of each row a window takes, (N): those that are longer lose some."""
        lengths = self.places[:, 1].copy()
        for i in np.flatnonzero(lengths > block_size + 1):
            lengths[i] = len(self.row(i, block_size))
        return lengths

    def windows(self, block_size: int, seed: int) -> list[list[int]]:
        return pack(self.lengths(block_size), block_size + 1, seed)

    def per_epoch(self, block_size: int, seed: int) -> int:
        return len(self.windows(block_size, seed))

    def epoch(self, number: int, block_size: int, seed: int) -> list[list[int]]:
        windows = self.windows(block_size, seed)
        rng = np.random.default_rng((seed, number))
        return [windows[i] for i in rng.permutation(len(windows))]

    def in_order(self, block_size: int) -> list[list[int]]:
        return self.windows(block_size, 0)

    def read(self, window: list[int], block_size: int) -> np.ndarray:
        tokens = np.concatenate([self.row(i, block_size) for i in window])
        empty = np.full(self.room * (block_size + 1) - len(tokens), self.fill)
        return np.concatenate([tokens, empty])

    def require(self, block_size: int) -> None:
        if not self.lengths(block_size).any():
            raise ValueError(
                f"no row of the task {self.task!r} in {self.strip.paths[0].parent} has an answer"
                f" that fits block_size={block_size}: use a larger one"
            )


class Lines(Rows):
    """Rows, each in a window of its own, for objectives that need a whole one by itself."""

    def windows(self, block_size: int, seed: int) -> list[list[int]]:
        return [[i] for i in np.flatnonzero(self.lengths(block_size)).tolist()]


class Pairs(Lines):
    """Rows with two answers, the better one and the worse, each pair in a window of its own. There
    is room for two windows, as each answer is read behind the prompt without the other."""

    kind = "pairs"
    room = 2

    def row(self, i: int, block_size: int) -> np.ndarray:
        """The prompt loses its front where the longer answer needs the room."""
        row = self.strip.read(*self.places[i])
        begins = np.flatnonzero(row == self.markers.assistant)[-2:]
        answers = np.split(row, begins)[1:]
        longest = max(answers, key=len)
        kept = fit(np.concatenate([row[: begins[0]], longest]), block_size + 1, self.markers)
        return np.concatenate([kept[: len(kept) - len(longest)], *answers]) if len(kept) else kept


class Documents(Lines):
    """The documents of a text, each in a window of its own, between two end-of-texts: behind the
    first one it begins, as every prompt does. Long ones are cut at their end."""

    kind = "text"

    def __init__(self, strip: Strip, end_of_text: int):
        self.end_of_text = end_of_text
        super().__init__(strip, "text", strip.rows(end_of_text)[0], None)

    def row(self, i: int, block_size: int) -> np.ndarray:
        begin, length = self.places[i]
        text = self.strip.read(begin, min(length, block_size))
        return np.concatenate([[self.end_of_text], text])

    def lengths(self, block_size: int) -> np.ndarray:
        return np.minimum(self.places[:, 1], block_size) + 1

    def describe(self, block_size: int) -> str:
        cut = int((self.places[:, 1] > block_size).sum())
        lost = f"; {cut:,} lose what is behind block_size={block_size}" if cut else ""
        return f"documents: {len(self.places):,}, a line each{lost}"


def tasks_of(strip: Strip, tokenizer: Tokenizer, lines: bool) -> list[Rows]:
    """The rows of each task, which their first token tells; those without one are "rows"."""
    places, firsts = strip.rows(tokenizer.end_of_text)
    names = {i: task for task, i in tokenizer.tasks().items()}
    tasks: dict[str, list[int]] = {}
    for i in np.unique(firsts).tolist():
        tasks.setdefault(names.get(i, "rows"), []).append(i)
    windows = Pairs if strip.kind == "pairs" else Lines if lines else Rows
    return [
        windows(strip, task, places[np.isin(firsts, ids)], tokenizer.markers)
        for task, ids in tasks.items()
    ]


def describe(parts: list[Rows], block_size: int, seed: int) -> str:
    """One line about how rows are packed, and what they lose."""
    windows = sum(part.per_epoch(block_size, seed) for part in parts)
    lengths = np.concatenate([part.lengths(block_size) for part in parts])
    whole = np.concatenate([part.places[:, 1] for part in parts])
    dropped = int((lengths == 0).sum())
    cut = int((lengths < whole).sum()) - dropped
    kind = parts[0].kind
    filled = lengths.sum() / (windows * parts[0].room * (block_size + 1))
    line = f"{kind}: {len(whole):,} in {windows:,} windows, {filled:.1%} of positions filled"
    if cut:
        line += f"; {cut:,} lose the front of their prompt"
    if dropped:
        line += f"; {dropped:,} are left out, as their answer is too long"
    return line + (f" for block_size={block_size}" if cut or dropped else "")


def pack(lengths: np.ndarray, room: int, seed: int) -> list[list[int]]:
    """Which rows go into which window of `room` tokens; a row of length 0 goes into none.

    Best fit, longest first: each row goes where least is left over, or into a new window. What the
    long ones leave, the short ones fill. Rows of equal length are in the random order of `seed`.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    windows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(room + 1)]  # windows by what is left in them
    any_with = 0  # bit r is set where with_room[r] has any: so the least that fits is found at once
    for row in order.tolist():
        length = int(lengths[row])
        if not length:
            break
        fitting = any_with >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1  # the lowest bit that is set
            number = with_room[left].pop()
            any_with ^= (not with_room[left]) << left
        else:
            left, number = room, len(windows)
            windows.append([])
        windows[number].append(row)
        with_room[left - length].append(number)
        any_with |= 1 << (left - length)
    return windows


def fit(row: np.ndarray, room: int, markers: Markers) -> np.ndarray:
    """The row, or what is to be learned from it in `room` tokens: nothing if its answer takes more.

    It keeps the marker of its task, its last answer, and before that as many turns as there is room
    for, the first of them without its front, unless that is an answer. The turn that is answered
    keeps its markers in any case.
    """
    if len(row) <= room:
        return row
    begins = np.flatnonzero(np.isin(row, markers[:3])).tolist()  # of turns, by the roles' markers
    kept = [row[begins[-1] :]]
    left = room - begins[0] - len(kept[0])  # before the first turn stands the task
    for start, end in zip(begins[-2::-1], begins[:0:-1], strict=True):
        if end - start <= left:
            kept.append(row[start:end])
            left -= end - start
            continue
        if row[start] != markers.assistant and left >= 2:
            kept += [row[end - left + 1 : end], row[start : start + 1]]
        elif len(kept) == 1:
            left = -1  # no room for the markers of what is answered
        break
    return row[:0] if left < 0 else np.concatenate([row[: begins[0]], *kept[::-1]])


def shares(sizes: list[tuple[str, int]], mix: str) -> list[float]:
    """How much of all windows each of some parts gets, given its task and its windows an epoch.

    By size, unless `mix` says more: shares by name, as in "text=0.2,sums=0.5", with the others
    sharing what is left; and a temperature, as in "temperature=2", by which they share it: by
    size^(1/2), so that small tasks are seen more often (Raffel et al. 2020, section 3.5.2). Raises
    ValueError.
    """
    total: Counter = Counter()
    for name, size in sizes:
        total[name] += size
    given = {}
    for word in filter(None, mix.split(",")):
        name, _, value = word.strip().partition("=")
        if name not in (*total, "temperature"):
            near = difflib.get_close_matches(name, total, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(total)}"
            raise ValueError(f"mix={mix!r} names the task {name!r}: {hint}")
        if name in given:
            raise ValueError(f"mix={mix!r} names {name!r} twice: give it one share")
        if not re.fullmatch(r"\d+\.?\d*|\.\d+", value):
            raise ValueError(f"mix={mix!r}: {name} should be a number, not {value!r}")
        given[name] = float(value)
    temperature = given.pop("temperature", 1.0)
    if not temperature:
        raise ValueError(f"mix={mix!r}: a temperature should be above 0")
    largest = max(total.values())  # sizes are relative to it, so that no power is too large
    others = {n: (size / largest) ** (1 / temperature) for n, size in total.items()}
    others = {name: size for name, size in others.items() if name not in given}
    left = 1 - sum(given.values())
    if left < -1e-9 or (left < 1e-9 if others else left > 1e-9):
        also = f", and leave something for {', '.join(others)}" if others else ""
        raise ValueError(f"mix={mix!r} should add up to 1{also}")
    weights = given | {name: left * size / sum(others.values()) for name, size in others.items()}
    whole = sum(weights.values())
    return [weights[name] / whole * size / total[name] for name, size in sizes]


def turns(shares: list[float], first: int, last: int) -> list[tuple[int, int]]:
    """For each window from `first` to `last` - 1 of an endless sequence the part that it belongs
    to, and how many of that part's came before.

    Each goes to the part that is furthest behind its share s: that with the least (n + 1/2) / s, if
    it has had n windows so far. Nobody has to go through all that came before, since part k gets
    its window n at the time (n + 1/2) / s, and by the time t all have got t, give or take half a
    window each. So it is enough to sort the windows around those that are wanted.
    """
    some = [k for k, share in enumerate(shares) if share > 0]
    near = len(some) + 1
    begin = {k: max(0, int((first - near) * shares[k])) for k in some}
    around = [
        ((n + 0.5) / shares[k], k, n)
        for k in some
        for n in range(begin[k], int((last + near) * shares[k]) + 2)
    ]
    skipped = sum(begin.values())
    return [(k, n) for _, k, n in sorted(around)[first - skipped : last - skipped]]
