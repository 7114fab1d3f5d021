"""Requests to stop: SIGINT, SIGTERM and SIGUSR1 are noted, and honoured where nothing is lost.

And how one of several processes ends when something is wrong: one of them must say what.
"""

import os
import signal
import time
from contextlib import contextmanager

LAUNCHER_ECHO = 2.0  # seconds; torchrun passes on a Ctrl-C that its processes have had themselves
GRACE = 3.0  # seconds; torchrun looks after its processes ten times a second


class Stop:
    """The request: `asked` is true once a signal has come.

    The training loop asks between two steps. While `at_once` is true there is no update under way
    and waiting could take long (imports, compilation, evaluation): then the process ends right in
    the signal handler, with status 0. A second signal ends it anywhere, with 128 + its number.
    """

    def __init__(self):
        self.asked, self.at_once, self.time = False, True, 0.0
        self.advice = "the same command continues"
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):  # Windows lacks one
                signal.signal(getattr(signal, name), self.note)

    @contextmanager
    def honoured(self, at_once: bool):
        """Sets for a while whether a request ends the process at once."""
        before, self.at_once = self.at_once, at_once
        try:
            yield
        finally:
            self.at_once = before

    def note(self, number: int, frame) -> None:
        if self.asked:
            if "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() < self.time + LAUNCHER_ECHO:
                return
            os._exit(128 + number)
        self.asked, self.time = True, time.monotonic()
        if self.at_once:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                # past Python's buffers, which the signal may have found in the middle of a print
                os.write(1, f"\nstopped by a signal; {self.advice}\n".encode())
            os._exit(0)


def peer_lost(error: Exception) -> bool:
    """Whether another process has ended in the middle of a sum: its fault, and not this one's."""
    named = type(error).__name__ in ("DistBackendError", "DistNetworkError")
    return named or "/gloo/" in str(error)


def speaker(victim: bool) -> str:
    """What a process says before its last words: nothing, or after a while its rank.

    Most mistakes are made by all processes alike. The first of them says so at once and ends, and
    torchrun ends the others within GRACE: who is still here then has made a mistake of its own, or
    is the `victim` of a process that nobody looked after.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0" and not victim:
        return ""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(GRACE * (4 if victim else 1))  # who has something to say goes first
    return f"rank {os.environ.get('RANK', 0)}: "
