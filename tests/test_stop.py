"""A request to stop is honoured where nothing is lost, and ends with the promised status."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

BEGIN = "import os, signal; from engine.stop import Stop; stop = Stop()\n"
ASK = "os.kill(os.getpid(), signal.SIGTERM)\n"


def run(code: str) -> tuple[int, str]:
    command = [sys.executable, "-c", BEGIN + code]
    env = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_a_request_while_nothing_is_under_way_ends_at_once_with_status_0():
    status, said = run(ASK + "print('went on')")
    assert status == 0 and "the same command continues" in said and "went on" not in said


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_a_request_within_a_step_waits_also_behind_an_evaluation():
    """An evaluation can be ended at once; what comes behind it in the same step can not."""
    code = "with stop.honoured(at_once=False):\n    with stop.honoured(at_once=True): pass\n    "
    status, said = run(code + ASK.strip() + "\n    print('the step', stop.asked)")
    assert status == 0 and said == "the step True\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_a_second_request_ends_anywhere_with_the_signals_status():
    status, said = run(
        "with stop.honoured(at_once=False):\n    " + ASK + "    " + ASK + "    print('went on')"
    )
    assert status == 128 + 15 and said == ""
