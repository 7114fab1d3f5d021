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
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
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
CountOrAuto = Literal["auto"] | Count
AboveZero = Annotated[float, Bound("above 0", lambda x: x > 0)]
NotNegative = Annotated[float, Bound("at least 0", lambda x: x >= 0)]
Fraction = Annotated[float, Bound("from 0 to 1", lambda x: 0 <= x <= 1)]
BelowOne = Annotated[float, Bound("at least 0, below 1", lambda x: 0 <= x < 1)]
PART = re.compile(r"(?P<k>[1-9]\d{0,4})/(?P<n>[1-9]\d{0,4})|")
Part = Annotated[str, Bound("k/n with k from 1 to n, such as 3/16", lambda part: is_part(part))]
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
Device = Annotated[str, Bound("auto, cpu, mps, cuda or one GPU such as cuda:1", DEVICE.fullmatch)]
Threads = Annotated[str, Bound("auto or a number from 1 to 1024", threads.valid)]
PICTURE = re.compile(r"(.*\.(png|svg|pdf))?")  # nothing is no picture
Picture = Annotated[str, Bound("a name that ends in .png, .svg or .pdf", PICTURE.fullmatch)]
Quantize = Annotated[str, Bound("int8 or left out", ("", "int8").__contains__)]
DType = Literal["auto", "bfloat16", "float16", "float32"]
Compile = Literal["auto", "true", "false"]


class Setting(NamedTuple):
    """One line of a dataclass."""

    kind: type
    choices: tuple = ()
    bound: Bound = Bound("anything", lambda value: True)
    default: Any = None
    comment: str = ""


@lru_cache
def settings_of(cls) -> dict[str, Setting]:
    """The settings of a dataclass by name: its fields that have a default, and those of dataclasses
    inside it."""
    comments = {}
    for base in cls.__mro__[:-1]:
        with suppress(OSError, TypeError):  # made by `make_dataclass`, which has no source
            found = re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(base), re.MULTILINE)
            comments |= dict(found)
    found = {}
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            own = getattr(f.default_factory, "keywords", {})  # of this one alone, as in plan.py
            inside = settings_of(f.type).items()
            found |= {n: line._replace(default=own.get(n, line.default)) for n, line in inside}
        elif f.default is not dataclasses.MISSING:
            if f.name not in comments:  # a formatter has wrapped it, say
                raise ValueError(
                    f"{cls.__name__}.{f.name} lacks the comment that --help shows: it stands on the"
                    f" line of the name, `{f.name}: type = default  # what it is`"
                )
            line = Setting(f.type, default=f.default, comment=comments[f.name])
            if f.type == CountOrAuto:
                word, number = get_args(f.type)
                kind, bound = get_args(number)
                line = line._replace(kind=kind, choices=get_args(word), bound=or_auto(bound))
            elif get_origin(f.type) is Annotated:
                kind, bound = get_args(f.type)
                line = line._replace(kind=kind, bound=bound)
            elif get_origin(f.type) is Literal:
                choices = get_args(f.type)
                bound = Bound(f"one of {', '.join(choices)}", choices.__contains__)
                line = line._replace(kind=str, choices=choices, bound=bound)
            found[f.name] = line
    return found


def or_auto(bound: Bound) -> Bound:
    return Bound(f"auto or {bound.words}", lambda value: value == "auto" or bound.kept(value))


def make(cls, values: dict):
    """An instance of dataclass `cls`, and of those inside it, from values by name."""
    own = {}
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            inside = {n: values[n] for n in settings_of(f.type) if n in values}
            own[f.name] = f.default_factory(**inside)
        elif f.name in values:
            own[f.name] = values[f.name]
    return cls(**own)


def flat(s) -> dict:
    """The settings of `s` and of dataclasses inside it, by name: what `make` takes."""
    values = dataclasses.asdict(s)
    for inside in [v for v in values.values() if isinstance(v, dict)]:
        values |= inside
    return {name: values[name] for name in settings_of(type(s))}


def known(cls, values: dict) -> dict:
    """The settings of `cls` as a file had them, checked; defaults for those that it lacks."""
    names = settings_of(cls)
    return flat(make(cls, {n: convert(n, v, names[n]) for n, v in values.items() if n in names}))


def load(
    cls,
    argv: list[str],
    description: str,
    positional: str,
    nargs: str | None = "?",
    owner: Callable[[str], str] = lambda name: "",
):
    """An instance of dataclass `cls` made from `argv`; `--help` prints its comments and defaults.

    `positional` is the field that takes the bare arguments, `nargs` of them in argparse's notation.
    If the field is called `config`, it is the path of a config file. `owner` says of an unknown
    name when it would be known. Raises ValueError, in one sentence that names the value, for
    anything a user can get wrong.
    """
    settings = settings_of(cls)

    # 1. the command line, as strings
    usage = f"%(prog)s [{positional}{' ...' if nargs == '+' else ''}] [--setting=value ...]"
    how = dict(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser = argparse.ArgumentParser(description=description, usage=usage, **how)
    parser.error = refuse  # its own would print the whole usage before the sentence
    for name, (kind, choices, _, default, comment) in settings.items():
        text = comment + ("" if default in ("", ()) else f" (default: {default})")
        text = text.replace("%", "%%")  # argparse would take it for a format
        if name == positional:
            parser.add_argument(name, nargs=nargs, help=text)
        else:
            many = {"action": "append"} if kind is tuple else {}
            shown = "|".join([*choices, *([] if choices and kind is str else [kind.__name__])])
            word = name.removesuffix("_")  # `and_` is --and: Python keeps that word to itself
            parser.add_argument("--" + word, dest=name, metavar=shown, help=text, **many)
    flags = {"--" + name for name, setting in settings.items() if setting.kind is bool}
    argv = [
        word if word not in flags or after.lower() in ("true", "false") else f"{word}=true"
        for word, after in zip(argv, [*argv, ""][1:], strict=True)
    ]
    given, rest = parser.parse_known_intermixed_args(argv)
    for word in rest:
        if not word.startswith("--"):
            raise ValueError(f"unexpected argument {word!r}: settings are given as --name=value")
        raise unknown(word[2:].split("=")[0], settings, "the command line", owner)

    # 2. the config file, then the command line over it
    values = {}
    if positional == "config":
        values = read_file(getattr(given, "config", settings["config"].default), settings, owner)
    for name, value in vars(given).items():
        values[name] = value if name == positional else convert(name, value, settings[name])
    return make(cls, values)


def peek(name: str, argv: list[str], config: str) -> str | None:
    """What the setting `name`, a plain word, has on the command line, or else in its config file:
    where that decides which settings there are. Mistakes are left for `load` to find."""
    for word, after in reversed([*zip(argv, [*argv, ""][1:], strict=True)]):
        if word == f"--{name}" or word.startswith(f"--{name}="):
            return after if word == f"--{name}" else word.partition("=")[2]
    file = Path(next((word for word in argv if word.endswith(".py")), config))
    file = file if file.is_file() else Path(__file__).parent.parent / file
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    found = re.search(rf"^{name} *= *[\"'](\w+)[\"']", text, re.MULTILINE)
    return found and found[1]


def refuse(message: str):
    raise ValueError(message)


# what nanoGPT calls otherwise: docs/nanogpt.md
NANOGPT = dict(dataset="data", out_dir="out", max_iters="steps", learning_rate="lr")
NANOGPT |= dict(batch_size="batch_tokens", gradient_accumulation_steps="batch_tokens")
NANOGPT |= dict(warmup_iters="warmup", lr_decay_iters="decay", min_lr="final_lr")
NANOGPT |= dict(eval_interval="eval_every", eval_iters="eval_tokens", log_interval="log_every")
NANOGPT |= dict(always_save_checkpoint="save_every", decay_lr="schedule")
NANOGPT |= dict(wandb_project="wandb", start="prompt", max_new_tokens="max_tokens")
RUN_FIRST = "the run stands first, as in sample.py out/small"
ELSEWHERE = dict(backend="torchrun chooses it", out_dir=RUN_FIRST, init_from=RUN_FIRST)


def unknown(name: str, known, where: str, owner: Callable[[str], str]) -> ValueError:
    if of := owner(name):
        return ValueError(f"{name} is a setting of {of}: choose that, or leave it out")
    names = {theirs: ours for theirs, ours in NANOGPT.items() if ours in known}
    if name not in names and name in ELSEWHERE:
        return ValueError(f"unknown setting {name!r} in {where}: {ELSEWHERE[name]}")
    names |= {ours: ours for ours in known}  # lerning_rate is near one of theirs
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {names[near[0]]}?" if near else "--help lists them all"
    return ValueError(f"unknown setting {name!r} in {where}: {hint}")


def read_file(path: str, settings: dict[str, Setting], owner=lambda name: "") -> dict:
    """Runs a config file; returns its assignments, each checked."""
    root = Path(__file__).parent.parent
    file = Path(path) if Path(path).is_file() else root / path  # config/small.py, from any folder
    if not file.is_file():
        there = ", ".join(sorted(file.stem for file in (root / "config").glob("*.py")))
        raise ValueError(f"no config file {path!r}: config/NAME.py, where NAME is {there}")
    try:
        # JSON and YAML can be valid Python that does nothing
        if file.suffix != ".py":
            raise ValueError("settings are assignments in a .py file, such as n_layer = 6")
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text, path)
        for node in tree.body[ast.get_docstring(tree) is not None :]:
            if isinstance(node, ast.Expr) or (isinstance(node, ast.AnnAssign) and not node.value):
                raise ValueError(f"line {node.lineno} assigns nothing: write n_layer = 6, say")
        names: dict = {}
        exec(compile(text, path, "exec"), names)
        values = {name: value for name, value in names.items() if not name.startswith("_")}
        for name, value in values.items():
            if name not in settings or name == "config":
                raise unknown(name, settings, "it (names of your own begin with _)", owner)
            values[name] = convert(name, value, settings[name])
    except (Exception, SystemExit) as e:  # whatever it is, it is a mistake in the file
        reason = e if type(e) is ValueError else f"{type(e).__name__}: {e}"
        raise ValueError(f"config file {path}: {reason}") from e
    return values


def convert(name: str, value, setting: Setting):
    """`value`, a string from the command line or an object from a file, as the setting wants it.

    Booleans are true and false and nothing else; an int is accepted for a float, and a whole float
    for an int (--steps=1e4).
    """
    kind, word, found = setting.kind, str(value).lower(), None
    if kind is tuple:
        found = tuple(value)
    elif kind is bool and word in ("true", "false"):
        found = word == "true"
    elif isinstance(value, bool):
        found = word if setting.choices else None  # compile = True
    elif kind is int and word in setting.choices:
        found = word
    elif kind is str:
        found = value if isinstance(value, str) else None
    elif kind in (int, float):
        try:
            number = int(value) if word.isdigit() else float(value)
            whole = number == int(number) and abs(number) < 2**63  # nan and inf end here
            found = kind(number) if whole or kind is float else None
        except (ValueError, TypeError, OverflowError):
            pass
    if found is None:
        want = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
        words = " or ".join([*(setting.choices if kind is int else ()), want[kind]])
        raise ValueError(f"{name}={str(value)[:60]!r} should be {words}")
    if not setting.bound.kept(found):
        raise ValueError(f"{name}={found!r} should be {setting.bound.words}")
    return found


def is_part(part: str) -> bool:
    found = PART.fullmatch(part)
    return bool(found) and (not part or int(found["k"]) <= int(found["n"]))


def require(kept, s, name: str, words: str) -> None:
    """Raises ValueError unless `kept`: the setting `name` of `s` should be what `words` say."""
    if not kept:
        raise ValueError(f"{name}={getattr(s, name)!r} should be {words}")


def require_bounds(s) -> None:
    """Raises ValueError for the first setting of `s` beyond its own bound."""
    for name, setting in settings_of(type(s)).items():
        require(setting.bound.kept(getattr(s, name)), s, name, setting.bound.words)


def require_package(name: str, wanted, package: str = "") -> None:
    """Raises ValueError for a module that lacks; its `package` may have another name."""
    if wanted and not importlib.util.find_spec(name):
        raise ValueError(f"{package or name} is not installed: pip install {package or name}")


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
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # the reader has seen enough, as in `... | head`
        status = 141  # as the shell reports it
    except (ValueError, OSError, MemoryError, RuntimeError) as e:
        said = sentence(e)
        if not said or sys.flags.dev_mode:
            raise
        who = stop.speaker(victim=stop.peer_lost(e))
        print(f"{Path(sys.argv[0]).name}: error: {who}{said}", file=sys.stderr, flush=True)
        status = 2
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:  # its reader is gone, or its disk is full: Python need not say so once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if status == 2 and "LOCAL_RANK" in os.environ:
        os._exit(2)  # to leave the other processes politely would be to wait for them
    sys.exit(status)


def sentence(e: Exception) -> str:
    """What to tell the user; nothing, if it is no mistake of theirs."""
    starved = any(word in str(e) for word in ("out of memory", "can't allocate memory"))
    if starved or isinstance(e, MemoryError):
        return "out of memory: use a smaller --device_batch, --block_size or model"
    if stop.peer_lost(e):
        return "another process of this run has ended, and so does this one"
    if isinstance(e, RuntimeError):
        return ""
    text = f"{e.filename}: {e.strerror}" if getattr(e, "filename", None) else str(e)
    if getattr(e, "errno", None) in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        text = f"the disk is full ({text}): nothing that was there before is lost"
    # a name may hold what would command the terminal
    return "".join(x if x.isprintable() or x == "\n" else ascii(x)[1:-1] for x in text)
