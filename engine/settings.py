"""Settings: the defaults of a dataclass, then a plain-Python file, then --key=value arguments.

A script declares its settings as a dataclass, one line and one comment each; the comment is the
help text. A config file holds assignments, such as `n_layer = 6`; every name in it that does not
start with an underscore must be a setting.
"""

import argparse
import dataclasses
import difflib
import errno
import inspect
import math
import os
import re
import signal
import sys
from pathlib import Path

from engine import stop


def load(cls, argv: list[str], description: str, positional: str, nargs: str | None = "?"):
    """An instance of dataclass `cls` made from `argv`; `--help` prints its comments and defaults.

    `positional` is the field that takes the bare arguments, `nargs` of them in argparse's notation.
    If the field is called `config`, it is the path of a config file. Raises ValueError, in one
    sentence that names the value, for anything a user can get wrong.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    types = {name: f.type for name, f in fields.items()}
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))

    # 1. the command line, as strings
    parser = argparse.ArgumentParser(
        description=description,
        usage=f"%(prog)s [{positional}{' ...' if nargs == '+' else ''}] [--setting=value ...]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.error = refuse  # its own would print the whole usage before the sentence
    for name, f in fields.items():
        text = comments[name] + ("" if f.default in ("", ()) else f" (default: {f.default})")
        text = text.replace("%", "%%")  # argparse would take it for a format
        if name == positional:
            parser.add_argument(name, nargs=nargs, help=text)
        else:
            many = {"action": "append"} if f.type is tuple else {}
            parser.add_argument("--" + name, metavar=f.type.__name__, help=text, **many)
    argv = [
        f"{word}=true"  # a bare --flag, not followed by its value
        if word.startswith("--")
        and types.get(word[2:]) is bool
        and after.lower() not in ("true", "false")
        else word
        for word, after in zip(argv, [*argv[1:], ""], strict=False)
    ]
    given, rest = parser.parse_known_intermixed_args(argv)
    for word in rest:
        if not word.startswith("--"):
            raise ValueError(f"unexpected argument {word!r}: settings are given as --name=value")
        raise unknown(word[2:].split("=")[0], types, "the command line")

    # 2. the config file, then the command line over it
    values = {}
    if positional == "config":
        values = read_file(getattr(given, "config", fields["config"].default), types)
    for name, value in vars(given).items():
        exact = name == positional or types[name] is tuple
        values[name] = value if exact else convert(name, value, types[name])
    return cls(**values)


def refuse(message: str):
    raise ValueError(message)


def unknown(name: str, known, where: str) -> ValueError:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "--help lists them all"
    return ValueError(f"unknown setting {name!r} in {where}: {hint}")


def read_file(path: str, types: dict[str, type]) -> dict:
    """Runs a config file; returns its assignments, each converted to its type in `types`."""
    root = Path(__file__).parent.parent
    if not Path(path).is_file() and (root / path).is_file():
        path = str(root / path)  # as config/small.py, from any folder
    if not Path(path).is_file():
        known = [f"config/{file.name}" for file in (root / "config").glob("*.py")]
        near = difflib.get_close_matches(path, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "the folder config/ holds those there are"
        raise ValueError(f"no config file {path!r}: {hint}")
    names: dict = {}
    try:
        exec(compile(Path(path).read_text(encoding="utf-8"), path, "exec"), names)
    except (Exception, SystemExit) as e:  # whatever it is, it is a mistake in the file
        raise ValueError(f"config file {path}: {type(e).__name__}: {e}") from e
    settings = {name: value for name, value in names.items() if not name.startswith("_")}
    for name, value in settings.items():
        if inspect.ismodule(value):
            raise ValueError(f"config file {path}: import {name} under a name like _{name}")
    for name, value in settings.items():
        if name not in types or name == "config":
            raise unknown(name, types, path)
        try:
            settings[name] = convert(name, value, types[name])
        except ValueError as e:
            raise ValueError(f"config file {path}: {e}") from e
    return settings


def convert(name: str, value, kind: type):
    """`value`, a string from the command line or an object from a file, as type `kind`.

    Booleans are true and false and nothing else; an int is accepted for a float, and a whole float
    for an int (--steps=1e4).
    """
    text = isinstance(value, str)
    if kind is bool:
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
    elif kind is str:
        if text:
            return value
    elif not isinstance(value, bool):
        try:
            number = int(value) if text and kind is int and value.isdigit() else float(value)
            if math.isfinite(number) and (kind is float or number == int(number)):
                return kind(number)
        except (ValueError, TypeError, OverflowError):
            pass
    want = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}[kind]
    raise ValueError(f"{name}={str(value)[:60]!r} should be {want}")


def check(s, *rules: tuple[str, str, bool]) -> None:
    """Raises ValueError for the first rule (setting, what it must be, whether it is) not kept."""
    for name, want, kept in rules:
        if not kept:
            raise ValueError(f"{name}={getattr(s, name)!r} should be {want}")


def run(main) -> None:
    """Runs `main(argv)` and exits: 0, or 2 with one sentence for a user's mistake or a full disk.

    Mistakes travel as ValueError and OSError. `python -X dev` shows where they come from.
    """
    if sys.stdout:
        sys.stdout.reconfigure(line_buffering=True)  # a log file is as far as the run is
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
