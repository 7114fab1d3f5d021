"""Chapter 2: windows, targets moved by one, epochs; what is learned without the shift."""

import math

import numpy as np

import dataset
from lessons import require

BOOK = "dataset"
TOKENS, T = 20, 4  # the drawing at the top of dataset.py


def windows() -> int:
    for epoch in range(2):
        starts = dataset.epoch_order(TOKENS, T, 5, epoch)
        for start in starts.tolist():
            tokens = list(range(start, start + T + 1))
            print(f"epoch {epoch}  x {tokens[:-1]}  y {tokens[1:]}")
    return dataset.windows_per_epoch(TOKENS, T)


def targets() -> int:
    starts = dataset.epoch_order(TOKENS, T, 5, 0)
    seen = sorted(start + 1 + i for start in starts.tolist() for i in range(T))
    print("targets of epoch 0:", seen)
    return len(set(seen))


def missed() -> float:
    """Percent of 10,000 windows that 10,000 draws with replacement leave out."""
    rng = np.random.default_rng(0)
    drawn = len(set(rng.integers(10_000, size=10_000).tolist()))
    print(f"drawn with replacement: {drawn:,} different of 10,000")
    print(f"a permutation:          {len(set(rng.permutation(10_000).tolist())):,}")
    return 100 * (1 - drawn / 10_000)


def unshifted() -> str:
    from lessons import ablations  # loads train.py

    found = ablations.learn(1, ablations.ABLATIONS["no_shift"])
    print(f"the loss it learns by, last step: {found['learned']:.2f}")
    print(f"as it writes, behind the bar:     {found['behind']:.2f}   guessing: {math.log(8):.2f}")
    if found["learned"] > 1:
        return "a"
    return "b" if found["behind"] > math.log(8) else "c"


QUESTIONS = (windows, targets, missed, unshifted)


# --- checks


def every_window_once():
    """Each epoch has every window once, and another order and phase than the one before."""
    for tokens, size in ((20, 4), (1000, 7), (65, 64)):
        orders = [dataset.epoch_order(tokens, size, 1, epoch).tolist() for epoch in range(8)]
        for starts in orders:
            steps = {b - a for a, b in zip(sorted(starts), sorted(starts)[1:], strict=False)}
            whole = len(starts) == dataset.windows_per_epoch(tokens, size) and steps <= {size}
            require(whole, f"an epoch of {tokens} tokens by {size} begins its windows at {starts}")
            inside = min(starts) >= 0 and max(starts) + size + 1 <= tokens
            require(inside, f"a window of {tokens} tokens by {size} reaches beyond them: {starts}")
    orders = {tuple(dataset.epoch_order(1000, 7, 1, epoch).tolist()) for epoch in range(8)}
    require(len(orders) == 8, f"eight epochs have only {len(orders)} different orders")


def exercises(function):
    """Exercise 2.a: exercises(tokens, starts, T): x and y, (B, T) each."""
    tokens = np.random.default_rng(0).integers(257, size=50)
    x, y = (np.asarray(z) for z in function(tokens, [3, 40, 0], 8))
    require(x.shape == y.shape == (3, 8), f"the shapes are {x.shape} and {y.shape}, not (3, 8)")
    for row, start in enumerate((3, 40, 0)):
        right = (x[row] == tokens[start : start + 8]).all()
        require(right, f"x of the window at {start} is {x[row].tolist()}")
        right = (y[row] == tokens[start + 1 : start + 9]).all()
        require(
            right, f"y of the window at {start} is {y[row].tolist()}: the tokens that come next"
        )


def window_of(function):
    """Exercise 2.b: window_of(step, row, rows, per_epoch): which epoch, which place in it."""
    for step, row, wanted in (
        (0, 0, (0, 0)),
        (999, 0, (3, 4968)),
        (999, 31, (3, 4999)),
        (281, 8, (1, 0)),
    ):
        found = tuple(function(step, row, 32, 9000))
        require(found == wanted, f"row {row} of step {step} is {found}, and should be {wanted}")


CHECKS = (every_window_once, exercises, window_of)
