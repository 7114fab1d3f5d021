"""How good are the pictures that a model draws? python images.py out/digits --split=test

A model that has learned from rows of pictures (tasks/digits.py; prepare.py FOLDER --images=16) says
how likely each pixel is, given the label and the pixels before. Its surprise in bits a pixel, or
**bits per dimension**, stands beside what simpler ones need: a histogram of the greys, one for each
place, and bigrams, the greys that follow the one on the left, or the one above.

And it draws. Are they digits? A classifier that has learned from the real ones should recognise
them (scikit-learn, optional). Are they its own? The nearest picture that it has learned from should
be no nearer than those are to each other.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

import objectives
from engine import pictures, settings
from engine.files import write_durably
from engine.settings import Count, NotNegative, Positive

SMOOTHING = 0.1  # of counts: what never came is not impossible
LABELS = "0 1 2 3 4 5 6 7 8 9"  # what sample.py --grid asks for, unless the prompt does
EACH = 10  # pictures of each, unless num_samples is above 1


@dataclass
class Settings:
    out: str = "out/digits"  # folder of a run, or one checkpoint of it
    checkpoint: str = "best"  # of a run: best (lowest validation loss), latest, or a step
    data: str = ""  # folder that prepare.py has written; by default that of the run
    split: Literal["val", "test"] = "test"  # pictures that were not learned from
    width: Count = 0  # of a picture in pixels; 0: it is square
    draw: Positive = 50  # pictures of each label to draw
    temperature: NotNegative = 1.0  # at which they are drawn
    slots: Positive = 128  # that are drawn side by side
    seed: int = 1  # of what is drawn
    device: settings.Device = "auto"  # auto, cpu, mps, cuda, or one GPU such as cuda:1
    dtype: settings.DType = "auto"  # of matrix products
    threads: settings.Threads = "auto"  # of a CPU: a number, or chosen by the size of the model
    fast: bool = True  # parts that compute the same as model.py, faster; false runs model.py itself
    deterministic: bool = False  # equal bits in every run on a GPU too, more slowly
    tokenizer: str = ""  # vocabulary of a folder of public shards, which has no meta.json


def main(argv: list[str]) -> None:
    s = settings.load(Settings, argv, "Judge the pictures that a model draws.", "out")
    import exam
    from engine.learner import opened_here
    from generate import answers

    run, here = opened_here(s, s.checkpoint)
    objectives.require_writer(run.state, s.out)
    data = run.data(s)
    if data.kind != "rows":
        raise ValueError(f"{data.folder} holds {data.kind}, and pictures are rows: --data=ROWS")
    known = exam.rows_of(data.split("train"))
    asked = exam.rows_of(data.split(s.split))
    model, tokenizer = exam.ready(run.model, here, s), run.tokenizer
    for task, rows in asked.items():
        if task not in known:
            raise ValueError(f"the train split of {data.folder} has no pictures of {task!r}")
        width, height = size_of(rows, s)
        learned = [pictures.pixels(row.reference, width, height) for row in known[task]]
        new = [pictures.pixels(row.reference, width, height) for row in rows]

        # 1. bits a pixel; the end of an answer is no pixel
        prompts = [tokenizer.encode_row(row.messages, task, open=True) for row in rows]
        choices = [[tokenizer.encode(row.reference)] for row in rows]
        nats = np.array(exam.surprise(model, tokenizer, prompts, choices))[:, 0]
        bits = nats / math.log(2) / (width * height)
        error = bits.std() / math.sqrt(len(bits))
        print(f"\n{task or 'pictures'}: {len(rows):,} of the {s.split} split, bits per dimension")
        print(f"  {bits.mean():.3f}  the model (plus or minus {error:.3f})")
        for name, found in floors(np.array(learned), np.array(new)).items():
            print(f"  {found:.3f}  {name}")

        # 2. what it draws
        labels = sorted({row.asked for row in known[task]}) * s.draw
        turns = ([dict(role="user", content=label)] for label in labels)
        prompts = [tokenizer.encode_row(asked, task, open=True) for asked in turns]
        drawn: list[np.ndarray] = [np.empty(0)] * len(labels)
        options = dict(slots=s.slots, seed=s.seed, temperature=s.temperature)
        wrong = 0
        for i, ids in answers(model, tokenizer, prompts, width * height + 1, **options):
            text = tokenizer.decode(ids)
            wrong += len(text) != width * height or bool({*text} - {*pictures.LETTERS})
            drawn[i] = pictures.pixels(text, width, height)
        print(f"{len(drawn):,} drawn at temperature {s.temperature:g}, {wrong} of another size")
        tell_recognised([learned, new, drawn], [known[task], rows], labels)
        tell_nearest(np.array(learned), np.array(drawn))


def size_of(rows: list, s: Settings) -> tuple[int, int]:
    sizes = {len(row.reference) for row in rows}
    letters = {c for row in rows for c in row.reference} <= {*pictures.LETTERS}
    if len(sizes) > 1 or not letters:
        raise ValueError("these rows are no pictures of one size: see tasks/digits.py")
    return pictures.size(rows[0].reference, s.width)


def floors(learned: np.ndarray, new: np.ndarray) -> dict[str, float]:
    """Bits a pixel by counts over the pictures (N, H, W) that were learned from; before the first
    pixel of a line, or column, stands black."""
    greys = np.unique(learned)
    (learned, new) = (np.searchsorted(greys, z).clip(max=len(greys) - 1) for z in (learned, new))

    def bits(before: np.ndarray, there: np.ndarray, kinds: int) -> float:
        counts = np.full((kinds, len(greys)), SMOOTHING)
        np.add.at(counts, (before.ravel(), learned.ravel()), 1)
        p = counts / counts.sum(axis=1, keepdims=True)
        return -np.log2(p[there, new]).mean()

    def moved(z: np.ndarray, axis: int) -> np.ndarray:
        edge = np.zeros_like(z.take([0], axis=axis))
        return np.concatenate([edge, z.take(range(z.shape[axis] - 1), axis=axis)], axis=axis)

    place = np.arange(learned[0].size).reshape(learned[0].shape)
    places = [np.broadcast_to(place, z.shape) for z in (learned, new)]
    return {
        "a histogram": bits(np.zeros_like(learned), np.zeros_like(new), 1),
        "a histogram of each place": bits(*places, place.size),
        "a bigram, of the pixel on the left": bits(moved(learned, 2), moved(new, 2), len(greys)),
        "a bigram, of the pixel above": bits(moved(learned, 1), moved(new, 1), len(greys)),
    }


def tell_recognised(images: list, rows: list, labels: list[str]) -> None:
    """Prints how many of those drawn a classifier takes for what was asked."""
    try:
        from sklearn.svm import SVC
    except ImportError:
        print("scikit-learn is not installed (pip install scikit-learn): nothing recognises them")
        return
    learned, new, drawn = (np.reshape(z, (len(z), -1)) for z in images)
    known, held_out = ([row.asked for row in some] for some in rows)
    if len({*known}) < 2:
        return
    svm = SVC(gamma="scale").fit(learned, known)
    by = "recognised by a classifier that has learned from the same pictures"
    real = f"of the held-out ones {svm.score(new, held_out):.1%}"
    print(f"  {svm.score(drawn, labels):.1%} {by} ({real})")


def tell_nearest(learned: np.ndarray, drawn: np.ndarray) -> None:
    """Prints how near drawings are to what was learned from, beside how near those are."""
    learned, drawn = (z.reshape(len(z), -1) for z in (learned, drawn))

    def nearest(some: np.ndarray, itself: bool) -> np.ndarray:
        away = (some**2).sum(1)[:, None] + (learned**2).sum(1) - 2 * some @ learned.T
        if itself:
            np.fill_diagonal(away, np.inf)
        return np.sqrt(away.min(axis=1).clip(min=0))

    both = {"a drawing": nearest(drawn, False)}
    both["a picture that was learned from"] = nearest(learned, True)
    for name, found in both.items():
        print(f"  nearest other to {name}: least {found.min():.3f}, median {np.median(found):.3f}")


def draw(model, tokenizer, s) -> None:
    """Writes a PNG with pictures of the labels that the prompt names, a row of the grid for each:
    `python sample.py RUN --grid=FILE.png`, of whose settings `s` is."""
    from generate import answers

    known = [*tokenizer.tasks()]
    task = s.task or (known[0] if len(known) == 1 else "")
    columns = s.num_samples
    labels = [label for label in (s.prompt or LABELS).split() for _ in range(columns)]
    settings.require(labels, s, "prompt", "labels to draw, such as '3 7'")
    turns = ([dict(role="user", content=label)] for label in labels)
    prompts = [tokenizer.encode_row(asked, task, open=True) for asked in turns]
    room = model.config.block_size + 1
    texts, options = [""] * len(labels), dict(top_k=s.top_k, top_p=s.top_p)
    options |= dict(temperature=s.temperature)
    keys = [(s.seed, i) for i in range(len(labels))]
    for i, ids in answers(model, tokenizer, prompts, room, keys=keys, **options):
        texts[i] = tokenizer.decode(ids)
    sizes = [len(text) for text in texts]
    usual = max(texts, key=lambda text: sizes.count(len(text)))  # has the length that most have
    drawn = [pictures.pixels(text, *pictures.size(usual, s.width)) for text in texts]
    write_durably(Path(s.grid), pictures.png(pictures.grid(drawn, columns)))
    print(f"wrote {s.grid}: {len(drawn)} pictures")


if __name__ == "__main__":
    settings.run(main)
