"""Settings: the defaults of a dataclass, then a plain-Python file, then --key=value arguments.

A script declares its settings as a dataclass, one line and one comment each: the comment is the
help text, the type says what may be set.

    steps: Positive = 1000  # updates
    schedule: Literal["linear", "cosine"] = "linear"  # the shape of the fall
    model: GPTConfig = field(default_factory=...)  # a dataclass inside: its settings count as well

A config file holds assignments, such as `n_layer = 6`; every name in it that does not start with an
underscore must be a setting.
"""

import argparse
import ast
import dataclasses
import difflib
import errno
import importlib.util
import inspect
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from engine import stop, threads


class Bound(NamedTuple):
    """What a setting must be, in words that follow "should be", and whether a value is that."""

    words: str
    kept: Callable[[Any], bool]


Positive = Annotated[int, Bound("at least 1", lambda n: n >= 1)]
Count = Annotated[int, Bound("at least 0", lambda n: n >= 0)]
NotNegative = Annotated[float, Bound("at least 0", lambda x: x >= 0)]
Fraction = Annotated[float, Bound("from 0 to 1", lambda x: 0 <= x <= 1)]
BelowOne = Annotated[float, Bound("at least 0, below 1", lambda x: 0 <= x < 1)]
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
Device = Annotated[str, Bound("auto, cpu, mps, cuda or one GPU such as cuda:1", DEVICE.fullmatch)]
Threads = Annotated[str, Bound("auto or a number from 1 to 1024", threads.valid)]
DType = Literal["auto", "bfloat16", "float16", "float32"]
Compile = Literal["auto", "true", "false"]


class Setting(NamedTuple):
    """One line of a dataclass."""

    kind: type
    choices: tuple
    bounds: list[Bound]
    default: Any
    comment: str


@lru_cache
def settings_of(cls) -> dict[str, Setting]:
    """The settings of a dataclass by name: its fields that have a default, and those of dataclasses
    inside it."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
    found = {}
    for f in dataclasses.fields(cls):
        kind, choices, bounds = f.type, (), []
        if dataclasses.is_dataclass(kind):
            found |= settings_of(kind)
            continue
        if get_origin(kind) is Annotated:
            kind, *bounds = get_args(kind)
        if get_origin(kind) is Literal:
            choices = get_args(kind)
            kind = str
            bounds = [Bound(f"one of {', '.join(choices)}", choices.__contains__)]
        if f.default is not dataclasses.MISSING:
            found[f.name] = Setting(kind, choices, bounds, f.default, comments[f.name])
    return found


def make(cls, values: dict):
    """An instance of dataclass `cls`, and of those inside it, from values by name."""
    own = {}
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            names = settings_of(f.type)
            own[f.name] = f.default_factory(**{n: v for n, v in values.items() if n in names})
        elif f.name in values:
            own[f.name] = values[f.name]
    return cls(**own)


def flat(s) -> dict:
    """The settings of `s` and of dataclasses inside it, by name: what `make` takes."""
    inside = [v for v in vars(s).values() if dataclasses.is_dataclass(v)]
    names = settings_of(type(s))
    values = {name: value for part in inside for name, value in flat(part).items()}
    return {name: values[name] if name in values else getattr(s, name) for name in names}


def known(cls, values: dict) -> dict:
    """The settings of `cls` as a file had them, checked; defaults for those that it lacks."""
    names = settings_of(cls)
    return flat(make(cls, {n: convert(n, v, names[n]) for n, v in values.items() if n in names}))


def load(cls, argv: list[str], description: str, positional: str, nargs: str | None = "?"):
    """An instance of dataclass `cls` made from `argv`; `--help` prints its comments and defaults.

    `positional` is the field that takes the bare arguments, `nargs` of them in argparse's notation.
    If the field is called `config`, it is the path of a config file. Raises ValueError, in one
    sentence that names the value, for anything a user can get wrong.
    """
    settings = settings_of(cls)

    # 1. the command line, as strings
    parser = argparse.ArgumentParser(
        description=description,
        usage=f"%(prog)s [{positional}{' ...' if nargs == '+' else ''}] [--setting=value ...]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.error = refuse  # its own would print the whole usage before the sentence
    for name, (kind, choices, _, default, comment) in settings.items():
        text = comment + ("" if default in ("", ()) else f" (default: {default})")
        text = text.replace("%", "%%")  # argparse would take it for a format
        if name == positional:
            parser.add_argument(name, nargs=nargs, help=text)
        else:
            many = {"action": "append"} if kind is tuple else {}
            shown = "|".join(choices) or kind.__name__
            parser.add_argument("--" + name, metavar=shown, help=text, **many)
    argv = [
        f"{word}=true"  # a bare --flag, not followed by its value
        if word.startswith("--")
        and word[2:] in settings
        and settings[word[2:]].kind is bool
        and after.lower() not in ("true", "false")
        else word
        for word, after in zip(argv, [*argv[1:], ""], strict=False)
    ]
    given, rest = parser.parse_known_intermixed_args(argv)
    for word in rest:
        if not word.startswith("--"):
            raise ValueError(f"unexpected argument {word!r}: settings are given as --name=value")
        raise unknown(word[2:].split("=")[0], settings, "the command line")

    # 2. the config file, then the command line over it
    values = {}
    if positional == "config":
        values = read_file(getattr(given, "config", settings["config"].default), settings)
    for name, value in vars(given).items():
        values[name] = value if name == positional else convert(name, value, settings[name])
    return make(cls, values)


def refuse(message: str):
    raise ValueError(message)


def unknown(name: str, known, where: str) -> ValueError:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "--help lists them all"
    return ValueError(f"unknown setting {name!r} in {where}: {hint}")


def read_file(path: str, settings: dict[str, Setting]) -> dict:
    """Runs a config file; returns its assignments, each checked."""
    root = Path(__file__).parent.parent
    if not Path(path).is_file() and (root / path).is_file():
        path = str(root / path)  # as config/small.py, from any folder
    if not Path(path).is_file():
        known = [f"config/{file.name}" for file in (root / "config").glob("*.py")]
        near = difflib.get_close_matches(path, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "the folder config/ holds those there are"
        raise ValueError(f"no config file {path!r}: {hint}")
    try:
        refuse_other_languages(path)
        names: dict = {}
        exec(compile(Path(path).read_text(encoding="utf-8"), path, "exec"), names)
        values = {name: value for name, value in names.items() if not name.startswith("_")}
        for name, value in values.items():
            if inspect.ismodule(value):
                raise ValueError(f"import {name} under a name like _{name}")
            if name not in settings or name == "config":
                raise unknown(name, settings, "it")
            values[name] = convert(name, value, settings[name])
    except (Exception, SystemExit) as e:  # whatever it is, it is a mistake in the file
        reason = e if type(e) is ValueError else f"{type(e).__name__}: {e}"
        raise ValueError(f"config file {path}: {reason}") from e
    return values


def refuse_other_languages(path: str) -> None:
    """Raises ValueError for what would do nothing: JSON and YAML can be valid Python."""
    if Path(path).suffix != ".py":
        raise ValueError("settings are assignments in a .py file, such as n_layer = 6")
    tree = ast.parse(Path(path).read_text(encoding="utf-8"), path)
    for node in tree.body[ast.get_docstring(tree) is not None :]:
        if isinstance(node, ast.Expr) or (isinstance(node, ast.AnnAssign) and not node.value):
            raise ValueError(f"line {node.lineno} assigns nothing: write n_layer = 6, for example")


def convert(name: str, value, setting: Setting):
    """`value`, a string from the command line or an object from a file, as the setting wants it.

    Booleans are true and false and nothing else; an int is accepted for a float, and a whole float
    for an int (--steps=1e4).
    """
    kind, text = setting.kind, isinstance(value, str)
    found = None
    if kind is tuple:
        found = tuple(value)
    elif kind is bool or (setting.choices and isinstance(value, bool)):
        word = str(value).lower()
        if word in ("true", "false"):
            found = word == "true" if kind is bool else word
    elif kind is str:
        found = value if text else None
    elif not isinstance(value, bool):
        try:
            number = int(value) if text and kind is int and value.isdigit() else float(value)
            if math.isfinite(number) and (kind is float or number == int(number)):
                found = kind(number)
        except (ValueError, TypeError, OverflowError):
            pass
    if found is None or (kind is int and abs(found) >= 2**63):
        want = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
        raise ValueError(f"{name}={str(value)[:60]!r} should be {want[kind]}")
    for bound in setting.bounds:
        if not bound.kept(found):
            raise ValueError(f"{name}={found!r} should be {bound.words}")
    return found


def check_each(s) -> None:
    """Raises ValueError for the first setting of `s` beyond its own bounds."""
    for name, setting in settings_of(type(s)).items():
        check(s, *((name, bound.words, bound.kept(getattr(s, name))) for bound in setting.bounds))


def check(s, *rules: tuple[str, str, bool]) -> None:
    """Raises ValueError for the first rule (setting, what it must be, whether it is) not kept."""
    for name, want, kept in rules:
        if not kept:
            raise ValueError(f"{name}={getattr(s, name)!r} should be {want}")


def require_package(name: str, wanted) -> None:
    if wanted and not importlib.util.find_spec(name):
        raise ValueError(f"{name} is not installed: pip install {name}")


def require_memory(size: int, what: str) -> None:
    """Raises ValueError for weights larger than all of the memory, where that is known."""
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if size > there:
            sizes = f"{size / 1e9:,.1f} GB, and this machine has {there / 1e9:,.1f} GB"
            raise ValueError(f"the weights of {what} take {sizes}: choose a smaller model")


def run(main) -> None:
    """Runs `main(argv)` and exits: 0, or 2 with one sentence for a user's mistake or a full disk.

    Mistakes travel as ValueError and OSError. `python -X dev` shows where they come from.
    """
    if sys.stdout:
        # a log file is as far as the run is; what a terminal cannot show ends no run
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    try:
        status = main(sys.argv[1:])
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):  # all is done: a request to stop must not spoil the status
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        if sys.stdout:  # may be closed from the beginning
            sys.stdout.flush()
        sys.exit(status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader has seen enough, as in `... | head`
        forget_stdout()
        sys.exit(141)  # as the shell reports it
    except (ValueError, OSError, MemoryError, RuntimeError) as e:
        memory = any(word in str(e) for word in ("out of memory", "can't allocate memory"))
        lost = stop.peer_lost(e)
        if isinstance(e, MemoryError) or memory:
            e = ValueError("out of memory: use a smaller --device_batch, --block_size or model")
        elif lost:
            e = ValueError("another process of this run has ended, and so does this one")
        elif isinstance(e, RuntimeError):
            raise  # no user's mistake
        if sys.flags.dev_mode:
            raise
        text = f"{e.filename}: {e.strerror}" if getattr(e, "filename", None) else e
        if getattr(e, "errno", None) in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            text = f"the disk is full ({text}): nothing that was there before is lost"
        who = stop.speaker(victim=lost)
        print(f"{Path(sys.argv[0]).name}: error: {who}{text}", file=sys.stderr, flush=True)
        try:
            sys.stdout.flush()
        except (OSError, AttributeError):  # standard output is closed, or its disk is full
            forget_stdout()
        if "LOCAL_RANK" in os.environ:
            os._exit(2)  # to leave the other processes politely would be to wait for them
        sys.exit(2)


def forget_stdout() -> None:
    """Lets Python close its standard output without another complaint."""
    if sys.stdout:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
