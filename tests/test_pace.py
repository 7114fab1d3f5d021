"""--minutes: as many steps as fit, found once, as late as can be, and kept by the checkpoints."""

import json
import os
import shutil
from types import SimpleNamespace

import forked
import pytest
from conftest import TINY
from test_train import interrupted, rows, training, weights

from engine import pace, preflight
from engine.pace import Pace
from engine.run import Run
from optim import learning_rate
from train import Settings

FIT = ["--steps=1000", "--minutes=2", "--eval_tokens=1", "--eval_every=1000", "--save_every=1000"]


def by_our_clock(seconds: list[float], setattr=setattr):
    """Every step of a run takes `seconds[0]`, and three of them tell the speed."""
    fit = Run.fit
    setattr(pace, "WARMING", 0)
    setattr(pace, "FEWEST", 3)
    setattr(Run, "fit", lambda run, step, taken: fit(run, step, seconds[0]))
    setattr(Run, "elapsed", lambda run: seconds[0] * getattr(run, "current", run.step))


@pytest.fixture
def seconds(monkeypatch):
    seconds = [10.0]
    by_our_clock(seconds, monkeypatch.setattr)
    return seconds


def test_a_number_that_is_found_is_as_good_as_one_that_is_asked_for(train, seconds, capsys):
    run = train("run", *FIT)
    # (120 - 5) / 10 are 11, of which the last 0.6 fall
    assert "minutes=2: 11 of 1000 steps fit, at 10000 ms a step" in capsys.readouterr().out
    assert json.loads((run / "config.json").read_text())["steps"] == 11
    kept = sorted(path.name for path in run.glob("step-*"))
    assert kept == ["step-00000005", "step-00000011"]  # before update 6, the first that depends
    asked = train("asked", *FIT, "--steps=11", "--minutes=0")
    assert rows(run) == rows(asked)
    assert weights(run, 11) == weights(asked, 11)
    all_fit = train("all", "--minutes=5")
    assert "minutes=5: all 8 steps fit" in capsys.readouterr().out
    assert rows(all_fit) == rows(train("plain")) and rows(all_fit)[-1]["step"] == 8


def test_a_run_that_is_killed_has_the_number_that_it_had(train, seconds, capsys):
    run = train("run", *FIT)
    whole = rows(run), weights(run, 11)
    shutil.rmtree(run / "step-00000011")
    seconds[0] = 0.01  # a machine that is faster now
    train("run", *FIT)
    assert "resumed from step 5" in capsys.readouterr().out
    assert (rows(run), weights(run, 11)) == whole
    train("run", *FIT)
    assert "nothing to do" in capsys.readouterr().out
    seconds[0] = 10.0
    train("run", *FIT, "--minutes=4")  # behind step 12, by the speed that is known
    assert "minutes=4: 23 of 1000 steps fit" in capsys.readouterr().out
    assert rows(run)[-1]["step"] == 23
    assert (run / "step-00000012").exists()  # the first update that depends on it
    assert training(run)[11]["lr"] == 0.02 * learning_rate(11, 23, 0, 0.6, 0.0, "linear")


def test_a_run_that_is_stopped_before_the_choice_makes_it_when_it_would_have(
    train, seconds, monkeypatch, capsys
):
    whole = train("whole", *FIT)
    run = interrupted(train, "run", monkeypatch, *FIT)
    assert rows(run)[-1]["step"] == 3
    train("run", *FIT)
    assert (rows(run), weights(run, 11)) == (rows(whole), weights(whole, 11))
    capsys.readouterr()
    interrupted(train, "other", monkeypatch, *FIT, "--minutes=9", "--steps=1000000000")
    assert "8:50 left" in capsys.readouterr().out  # of 540 seconds
    train("other", *FIT, "--minutes=1", "--log_every=100")  # 3 of 5 steps: it is time at once
    assert rows(train.folder / "other")[-1]["step"] == 5
    config = json.loads((train.folder / "other" / "config.json").read_text())
    assert config["steps"] == 5 and "minutes=1: 5 of 1000 steps fit" in capsys.readouterr().out


def unequal():
    by_our_clock([10.0 + 3 * int(os.environ["RANK"])])


@pytest.mark.cpu  # one GPU serves one process
def test_several_processes_choose_as_the_first_one_does(data, tmp_path):
    (tmp_path / "empty.py").write_text("")
    argv = [tmp_path / "empty.py", f"--data={data}", f"--out={tmp_path / 'run'}", *TINY, *FIT]
    both = [
        forked.Forked("train.py", *argv, env=env, before=unequal) for env in forked.environments(2)
    ]
    try:
        status = [process.wait() for process in both]  # if they do not, one waits for ever
    finally:
        for process in both:
            process.kill()
    said = [process.communicate()[0] for process in both]
    assert status == [0, 0], said
    assert "11 of 1000 steps fit, at 10000 ms a step" in said[0]
    assert rows(tmp_path / "run")[-1]["step"] == 11


def test_steps_of_the_command_line_count_more_than_minutes_of_a_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("minutes = 2\nsteps = 10\n")
    assert preflight.read(Settings, [str(path)]).minutes == 2
    assert preflight.read(Settings, [str(path), "--steps=9"]).minutes == 0
    assert preflight.read(Settings, [str(path), "--steps=9", "--minutes=1"]).minutes == 1


# --- the choice itself


def asked(**changes) -> SimpleNamespace:
    s = dict(minutes=3.6, steps=1500, batch_tokens=10, eval_tokens=0, eval_every=750)
    s |= dict(warmup=0, decay=0.8, final_lr=0.0, schedule="linear")
    return SimpleNamespace(**s | changes)


def chosen(s, takes, held_out: int = 0) -> tuple[int, int]:
    """Behind which step the number is chosen if step k takes `takes(k)` seconds, and the number."""
    there, seconds = Pace(s, 0, None, held_out), 0.0
    for step in range(1, s.steps + 1):
        seconds += takes(step)
        if there.choose(step, takes(step), seconds):
            return step, s.steps


@pytest.mark.parametrize(
    ("changes", "due", "steps"),
    [
        (dict(), 169, 844),  # (216 - 5) / 0.25 fit; behind 0.2 of them the rate falls
        (dict(schedule="cosine"), 169, 844),
        (dict(warmup=100), 169, 844),
        (dict(warmup=0.02), 169, 844),  # of 1,500 the rise is over, when a number can be chosen
        (dict(warmup=0.1), 60, 844),  # from here on the rise is another
        (dict(decay=1.0), 60, 844),
        (dict(decay=0.0), 844, 844),  # a rate that is constant to the end waits for the end
        (dict(final_lr=1.0), 844, 844),
        (dict(steps=400), 81, 400),  # never more than asked
        (dict(minutes=0.2), 60, 66),  # never fewer than tell the speed, and then the rate falls
        (dict(minutes=0.2, decay=0.02), 60, 61),
        (dict(minutes=0.2, decay=0.0), 60, 60),
    ],
)
def test_the_number_is_chosen_before_the_rate_depends_on_it(changes, due, steps):
    s = asked(**changes)
    assert chosen(s, lambda step: 0.25) == (due, steps)
    if due > 60:  # all rates so far are those of that number, but for such a rise
        shape = s.warmup, s.decay, s.final_lr, s.schedule
        so_far = range(60 if 0 < s.warmup < 1 else 0, due)
        numbers = steps, asked(**changes).steps
        one, other = ([learning_rate(step, n, *shape) for step in so_far] for n in numbers)
        assert one == other


def test_slow_steps_at_first_and_a_stall_cost_little():
    # the first 60 at 5,200 tokens a second, the others at 8,500: 211 s are enough for 1,128 steps
    _, found = chosen(asked(), lambda step: 0.295 if step <= 60 else 0.1807)
    assert 980 < found < 1128  # by the first 60 alone it were 715
    # one of 10 s, where there would be 844 steps without, and 805 are left
    _, found = chosen(asked(), lambda step: 10.0 if step == 100 else 0.25)
    assert 795 < found <= 805
    # one that takes all that is left: a tenth more, so that the rate falls
    assert chosen(asked(), lambda step: 180.0 if step == 160 else 0.25) == (160, 176)
    # twice as slow at every other step is no stall: 211 / 0.3 fit
    _, found = chosen(asked(), lambda step: 0.2 if step % 2 else 0.4)
    assert abs(found - 703) < 3


def test_evaluations_are_reckoned_with():
    s = asked(minutes=2, steps=10_000, eval_every=100, decay=1.0)
    # 2,000 tokens take as long as 100 steps: 60 + (120 - 6 - 5 - 10) / (0.1 + 10 / 100)
    assert chosen(s, lambda step: 0.1, held_out=2_000) == (60, 555)
    few = asked(minutes=2, steps=10_000, eval_every=100, decay=1.0, eval_tokens=200)
    # 60 + (120 - 6 - 5 - 1) / (0.1 + 1 / 100)
    assert chosen(few, lambda step: 0.1, held_out=2_000) == (60, 1041)
