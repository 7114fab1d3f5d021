"""Tasks that need nothing from outside: generated, or made from Python's own library.

Each is a file with two functions. `rows(split, seed, val, test)` yields rows (conversations of a
user and an assistant, with a marker that names the task), where val and test are the fractions held
back; `right(prompt, answer, reference)` tells whether an answer is right, by working it out from
the prompt where that is possible.

    python prepare.py sums numbers --out=data/tasks     one data set of two tasks
"""

import importlib
import math
import random
from collections.abc import Callable, Hashable, Iterator
from itertools import chain
from types import ModuleType
from typing import TypeVar

from engine.index import uniform

NAMES = ("digits", "docstrings", "facts", "modules", "numbers")
NAMES += ("repeat", "sums", "sums_plain", "tictactoe")
VAL = TEST = 0.05  # what is held back of all that there is, as in prepare.py
DRAWS = 1_000_000  # after so many, there is nothing new to be found
Drawn = TypeVar("Drawn", bound=Hashable)


def find(task: str) -> ModuleType | None:
    """The file of a task, by its name or by the marker of one of its rows; None if it has none."""
    names = [name for name in NAMES if task == name or task.startswith(f"{name}_")]
    return importlib.import_module(f"tasks.{max(names, key=len)}") if names else None


def checker(name: str, imports: bool = False) -> Callable[[str, str, str], float]:
    """What tells how good an answer is, given prompt, answer and reference: `right` of the built-in
    task `name`, or, where that may be imported, a function `module:function`. Raises ValueError."""
    module, _, function = name.partition(":")
    wanted = "give --reward=MODULE:FUNCTION, a function of prompt, answer and reference"
    if not function:
        if not find(name):
            raise ValueError(f"no built-in task {name!r}, whose answers could be checked: {wanted}")
        return find(name).right
    if not imports:
        raise ValueError(f"reward={name!r} stands in a checkpoint, from which nothing is imported")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError, SyntaxError) as e:
        raise ValueError(f"reward={name!r} cannot be imported ({e}): {wanted}") from e
    if not callable(found):
        raise ValueError(f"reward={name!r} is no function: {wanted}")
    return found


def worth(check: Callable, prompt: str, answer: str, reference: str) -> float:
    """What `check` says that an answer is worth. Raises ValueError if that is no finite number."""
    found = check(prompt, answer, reference)
    try:
        if math.isfinite(number := float(found)):
            return number
    except (TypeError, ValueError):
        pass
    raise ValueError(f"the reward of {answer[:60]!r} should be a number, and is {found!r:.60}")


def groups(task: str, split: str, made: dict) -> dict[str, str]:
    """The group of each row by its prompt, where a built-in task has groups: they are not stored,
    but made again. `made` are the settings of prepare.py."""
    module = find(task)
    if not module:
        return {}
    shares = (made.get(name, share) for name, share in (("val", VAL), ("test", TEST)))
    rows = iter(module.rows(split, made.get("seed", 0), *shares))
    first = next(rows, {})
    if "group" not in first:  # then no row has one, and to make all of them takes long
        return {}
    return {row["messages"][0]["content"]: row["group"] for row in chain([first], rows)}


def row(task: str, prompt: str, answer: str, group: str = "") -> dict:
    turns = [dict(role="user", content=prompt), dict(role="assistant", content=answer)]
    return dict(messages=turns, task=task) | (dict(group=group) if group else {})


def split_of(u: float, val: float, test: float) -> str:
    """The split of what has the number `u`, uniform in [0, 1), if val and test are its shares."""
    return "val" if u < val else "test" if u < val + test else "train"


def distinct(
    draw: Callable[[random.Random], Drawn],
    key: Callable[[Drawn], Hashable],
    split: str,
    seed: int,
    val: float,
    test: float,
) -> Iterator[Drawn]:
    """What `draw` draws, each thing once, if its `key` belongs to `split`: very many of them.

    A hash of the key decides, whatever the seed: no seed shows a test in training.
    """
    if not dict(train=1 - val - test, val=val, test=test)[split]:
        return
    rng = random.Random(f"{split} {seed}")
    seen = set()
    for _ in range(DRAWS):
        drawn = draw(rng)
        u = uniform(repr(key(drawn)).encode())
        if drawn not in seen and split_of(u, val, test) == split:
            seen.add(drawn)
            yield drawn
