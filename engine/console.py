"""Talking with a person: a marker, line editing and history, and a Ctrl-C that is quiet."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress

MARKER = "> "


def leave_quietly() -> None:
    """From here on a Ctrl-C ends the process at once, with status 130 and without a traceback.

    And without unwinding: an exception may be swallowed by what is being imported, torch above all.
    """
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))


def lines() -> Iterator[str]:
    """The lines that a person types, or a pipe sends, without the empty ones, until they end.

    Meanwhile a Ctrl-C raises KeyboardInterrupt where a line is answered; at the marker it takes
    back what was typed.
    """
    if not sys.stdin:  # closed from the beginning
        return
    marker = ""  # a pipe wants none
    if sys.stdin.isatty() and sys.stdout.isatty():
        marker = MARKER
        with suppress(ImportError):  # Windows' console edits lines without it
            import readline  # noqa: F401  gives input() line editing and history
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        while True:
            try:
                line = input(marker)
            except KeyboardInterrupt:
                print()
                continue
            except EOFError:
                if marker:
                    print()
                return
            if line:
                yield line
    finally:
        signal.signal(signal.SIGINT, before)
