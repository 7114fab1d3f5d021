"""--minutes: as many steps as fit, found once, and kept by the checkpoints."""

import json
import time
from types import SimpleNamespace

import pytest
from test_train import interrupted, rows, weights

from engine import pace
from engine.metrics import read_metrics
from engine.pace import Pace
from train import read_settings


@pytest.fixture
def soon(monkeypatch):
    """Two steps are measured, behind the first; of which each takes `seconds[0]`."""
    monkeypatch.setattr("train.START", time.monotonic())  # not when these tests began
    monkeypatch.setattr(pace, "WARMING", 1)
    monkeypatch.setattr(pace, "MEASURED", 2)
    seconds, clock = [10.0], [0.0]
    measure = Pace.measure

    def by_our_clock(self, step, now):
        clock[0] += seconds[0]
        return measure(self, step, clock[0])

    monkeypatch.setattr(Pace, "measure", by_our_clock)
    return seconds


def test_as_many_steps_as_fit(train, soon, capsys):
    run = train("run", "--minutes=5")
    assert "minutes=5: all 8 steps fit" in capsys.readouterr().out
    last = rows(run)[-1]["step"]
    assert last == 8 and read_metrics(run)[-1]["val_loss"]
    short = train("short", "--minutes=0.8", "--steps=1000", "--eval_tokens=1")
    said = capsys.readouterr().out
    found = int(said.split("minutes=0.8: ")[1].split()[0])
    assert 5 <= found <= 7 and f"{found} of 1000 steps fit, at 10000 ms a step" in said
    assert rows(short)[-1]["step"] == found
    assert json.loads((short / "config.json").read_text())["steps"] == found


def test_a_run_that_is_resumed_has_the_number_that_it_had(train, soon, monkeypatch, capsys):
    settings = ["--steps=1000", "--minutes=0.8", "--eval_tokens=1"]
    whole = train("whole", *settings)
    found = rows(whole)[-1]["step"]
    interrupted(train, "run", monkeypatch, *settings)  # at step 3, with the choice
    soon[0] = 0.01  # a machine that is faster now
    run = train("run", *settings)
    assert weights(run, found) == weights(whole, found)
    assert rows(run) == rows(whole)
    train("run", *settings)
    assert "nothing to do" in capsys.readouterr().out
    more = train("run", "--steps=1000", "--minutes=2", "--eval_tokens=1")  # asked for longer
    assert f"steps was {found}, is " in capsys.readouterr().out
    assert rows(more)[-1]["step"] > found


def test_steps_of_the_command_line_count_more_than_minutes_of_a_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("minutes = 2\nsteps = 10\n")
    assert read_settings([str(path)]).minutes == 2
    assert read_settings([str(path), "--steps=9"]).minutes == 0
    assert read_settings([str(path), "--steps=9", "--minutes=1"]).minutes == 1


def test_evaluations_are_reckoned_with():
    s = SimpleNamespace(minutes=2, steps=10_000, eval_tokens=0, eval_every=100, batch_tokens=10)
    there = Pace(s, 0, None, 0.0, held_out=3_000)  # takes as long as 100 steps to evaluate
    there.choose(60, 15.0, 0.1)
    # 60 + (120 - 15 - 5 - 10) / (0.1 + 10 / 100)
    assert s.steps == 510
    again = Pace(SimpleNamespace(**vars(s) | dict(steps=10_000)), 300, there.found, 99.0, 3_000)
    assert again.s.steps == 510 and not again.due
    fast = SimpleNamespace(**vars(s) | dict(steps=400))
    Pace(fast, 0, None, 0.0, 3_000).choose(60, 15.0, 0.1)
    assert fast.steps == 400  # never more than were asked for
