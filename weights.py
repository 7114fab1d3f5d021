"""Weights that only a passphrase opens, and weights that one can trust.

    python weights.py lock out/small       asks for a passphrase; sample.py takes --passphrase_file
    python weights.py unlock out/small     all as it was, to the byte
    python weights.py keys me              me.key to sign with, for you; me.pub for all
    python weights.py sign out/small --key=me.key
    python weights.py verify out/small --key=me.pub

Locked weights are safe from whoever steals the disk; a signature tells a swapped download from what
its maker has made. Neither does the work of the other: engine/locked.py, engine/signatures.py.
"""

import sys
from dataclasses import dataclass
from getpass import getpass
from pathlib import Path

from engine import locked, settings, signatures
from engine.checkpoint import find


@dataclass
class Settings:
    command: tuple = ()  # lock, unlock, sign or verify FOLDER; keys NAME
    passphrase_file: str = ""  # of lock and unlock: a file with the passphrase; else a person types
    key: str = ""  # of sign: your NAME.key; of verify: the NAME.pub of whom you trust


def main(argv: list[str]) -> None:
    s = settings.load(Settings, argv, "Lock and sign weights.", "command", nargs="*")
    command, name = s.command if len(s.command) == 2 else ("", "")
    if command not in ("lock", "unlock", "keys", "sign", "verify"):
        raise ValueError("say what to do: lock, unlock, sign or verify FOLDER, or keys NAME")
    signs, locks = command in ("sign", "verify"), command in ("lock", "unlock")
    half = "a NAME.key to sign with, or the NAME.pub to verify by, and else left out"
    settings.require(bool(s.key) == signs, s, "key", half)
    only = "left out but to lock and unlock"
    settings.require(locks or not s.passphrase_file, s, "passphrase_file", only)
    if command == "keys":
        signatures.make_keys(name)
        print(f"{name}.key is to sign with, and yours alone; {name}.pub is for all, to verify")
    elif signs:
        count = getattr(signatures, command)(Path(name), Path(s.key))
        print(f"{name}: {count} files, {'now' if command == 'sign' else 'all'} signed by {s.key}")
    else:
        find(name)  # a run or a checkpoint, or a sentence
        settings.require_package("pyrage", True)
        file = s.passphrase_file
        passphrase = locked.read_passphrase(file) if file else ask(command)
        count = len(getattr(locked, command)(Path(name), passphrase))
        print(f"{name} is {command}ed (files of weights: {count})")


def ask(command: str) -> str:
    """The passphrase, from a person; a new one twice."""
    if not sys.stdin or not sys.stdin.isatty():
        raise ValueError("no terminal to ask for the passphrase: give --passphrase_file=FILE")
    said = getpass("passphrase: ")
    if not said or (command == "lock" and getpass("once more: ") != said):
        raise ValueError("no passphrase, or not twice the same: nothing was changed")
    return said


if __name__ == "__main__":
    settings.run(main)
