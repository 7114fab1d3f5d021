"""TensorBoard and Weights & Biases get every row of metrics.jsonl: packages of ours stand in."""

import sys
import types

import pytest

from engine.metrics import read_metrics

WANDB = """
calls = []

class Session:
    def log(self, data, step=None):
        calls.append(("log", step, dict(data)))

    def finish(self):
        calls.append(("finish",))

def init(**settings):
    calls.append(("init", settings))
    return Session()
"""


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Installed, as far as anyone can tell: wandb, tensorboard and torch's way to write for it."""
    folder = tmp_path / "packages"
    for name, content in (("wandb", WANDB), ("tensorboard", "")):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(content)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)
    writer = types.ModuleType("torch.utils.tensorboard")
    writer.calls = []

    class SummaryWriter:
        def __init__(self, folder):
            writer.calls.append(("folder", str(folder)))

        def add_scalar(self, name, value, step):
            writer.calls.append((name, value, step))

        def close(self):
            writer.calls.append(("close",))

    writer.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, writer.__name__, writer)
    yield writer
    sys.modules.pop("wandb", None)


def test_weights_and_biases_gets_every_row(train, packages):
    run = train("run", "--wandb=a_project")
    (_, settings), *logged, last = sys.modules["wandb"].calls
    assert settings["project"] == "a_project" and settings["name"] == "run"
    assert settings["config"]["steps"] == 8
    assert logged == [("log", row["step"], row) for row in read_metrics(run)]
    assert last == ("finish",)


def test_tensorboard_gets_every_number_of_every_row_in_the_folder_of_the_run(train, packages):
    run = train("run", "--tensorboard")
    (_, folder), *scalars, last = packages.calls
    assert folder.startswith(str(run))
    rows = read_metrics(run)
    expected = [(k, v, row["step"]) for row in rows for k, v in row.items() if k != "step"]
    assert scalars == [item for item in expected if item[1] is not None]
    assert last == ("close",)


def test_a_run_that_is_watched_is_the_run_that_is_not(train, packages):
    model = "step-00000008/model.safetensors"
    watched, alone = train("watched", "--wandb=p", "--tensorboard"), train("alone")
    assert (watched / model).read_bytes() == (alone / model).read_bytes()
