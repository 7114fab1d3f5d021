"""Whoever else reads along gets every row, once, and one run there is one run here."""

import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest

from engine.metrics import read_metrics


class Tracked:
    """Plays the modules of TensorBoard and of Weights & Biases."""

    def __init__(self, monkeypatch):
        self.scalars: list[tuple] = []  # what TensorBoard was given
        self.folders: list[str] = []  # where it was to write
        self.sessions: list[dict] = []  # with what wandb was started
        self.rows: list[tuple[int, dict]] = []  # what wandb was given
        self.ended: list[str] = []
        modules = {
            "tensorboard": {},
            "torch.utils.tensorboard": dict(SummaryWriter=self.writer),
            "wandb": dict(init=self.init),
        }
        for name, content in modules.items():
            spec = ModuleSpec(name, None)  # as if it were installed
            monkeypatch.setitem(sys.modules, name, SimpleNamespace(__spec__=spec, **content))

    def writer(self, folder, purge_step):
        self.folders.append(folder)
        add = lambda name, value, step: self.scalars.append((step, name, value))  # noqa: E731
        return SimpleNamespace(add_scalar=add, close=lambda: self.ended.append("tensorboard"))

    def init(self, **how):
        self.sessions.append(how)
        log = lambda row, step=None: self.rows.append((step, dict(row)))  # noqa: E731
        return SimpleNamespace(log=log, finish=lambda: self.ended.append("wandb"))


@pytest.fixture
def tracked(monkeypatch) -> Tracked:
    return Tracked(monkeypatch)


def test_nobody_reads_along_unasked(train, tracked):
    train("run")
    assert tracked.folders == tracked.sessions == tracked.ended == []


def test_tensorboard_gets_every_number_of_every_row(train, tracked):
    run = train("run", "--tensorboard=true")
    rows = read_metrics(run)
    expected = {
        (row["step"], name, value)
        for row in rows
        for name, value in row.items()
        if name != "step" and value is not None
    }
    assert set(tracked.scalars) == expected and len(rows) == 10
    assert tracked.folders == [str(run / "tensorboard")] and tracked.ended == ["tensorboard"]


def test_wandb_gets_every_row_and_the_settings(train, tracked):
    run = train("run", "--wandb=nutshell")
    assert tracked.rows == [(row["step"], row) for row in read_metrics(run)]
    (session,) = tracked.sessions
    assert session["project"] == "nutshell" and session["name"] == "run"
    assert session["config"]["batch_tokens"] == 256 and session["config"]["n_embd"] == 32
    assert tracked.ended == ["wandb"]


def test_a_run_that_goes_on_goes_on_in_wandb_too(train, tracked):
    train("run", "--wandb=nutshell", "--steps=4")
    run = train("run", "--wandb=nutshell", "--steps=8")
    train("other", "--wandb=nutshell", "--steps=4")
    first, second, other = tracked.sessions
    assert first["id"] == second["id"] != other["id"]
    assert all(session["resume"] for session in tracked.sessions)
    steps = [step for step, row in tracked.rows if "loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4]
    assert [row["step"] for row in read_metrics(run) if "loss" in row] == steps[:8]


def test_nothing_is_believed_behind_a_torn_row(tmp_path):
    rows = [b'{"step": 1, "tokens": 8}', b'{"step": 2, "tok', b'{"step": 3, "tokens": 24}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(rows) + b"\n")
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
