"""What every objective promises: tests/test_<objective>.py calls these with its own settings."""

import json
from dataclasses import asdict
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from conftest import TINY, on_cpu, on_gpu

import evaluate
import huggingface
import objectives
import train as script
from dataset import Dataset
from engine import machine, preflight, settings
from engine.learner import Learner


def plain(gpt) -> Learner:
    """A trunk as it is, under the objective of predicting the next token."""
    cls = objectives.with_settings(script.Settings, "next_token")
    s = settings.make(cls, asdict(gpt.config))
    return Learner(gpt, objectives.find("next_token").Objective(s, None))


def make(data: Path, *argv: str):
    """A learner with its first weights, and a batch: (learner, batch)."""
    name = settings.peek("objective", [*argv], "")
    cls = objectives.with_settings(script.Settings, name)
    s = settings.load(cls, [*TINY, f"--data={data}", *argv], "", "config")
    Objective = objectives.find(name).Objective
    preflight.check(s)
    dataset = Dataset(s.data, "", s.model.mask, s.train_on, s.mix, Objective.lines)
    objective = Objective(s, dataset.tokenizer)
    objective.require(dataset)
    here = machine.pick("cpu", "float32", "false")
    gpt = preflight.new_model(s, dataset, here)
    learner = Learner(gpt, objective)
    rows = s.batch_tokens // s.model.block_size
    batch = dataset.split("train").batch(0, rows, s.model.block_size, s.seed)
    objective.kept(objective.begin(learner, dataset, here))
    return learner, batch


def means(learner: Learner, batch) -> dict[str, float]:
    """The mean of each term, and of all `loss`, without dropout."""
    learner.eval()
    inputs, counts = learner.objective.prepare(batch, learner)
    with torch.no_grad():
        sums = learner(*tensors(inputs))
    named = dict(zip(learner.objective.terms, map(float, sums), strict=True))
    found = {k: v / n for (k, v), n in zip(named.items(), counts, strict=True)}
    return found | {"total": float(learner.objective.total(sums, counts))}


def tensors(inputs) -> list:
    return [z if z is None else torch.from_numpy(np.ascontiguousarray(z)) for z in inputs]


def shared_out_alike(learner: Learner, batch) -> None:
    """A batch in two shares has the same counts and sums: what processes and passes rely on."""
    learner.eval()

    def sums(*share):
        inputs, counts = learner.objective.prepare(batch.windows(*share), learner)
        return np.array([[float(x) for x in learner(*tensors(inputs))], counts])

    middle = len(batch.keys) // 2
    with torch.no_grad():
        parts = sums(0, middle) + sums(middle, len(batch.keys))
        np.testing.assert_allclose(parts, sums(0, len(batch.keys)), rtol=1e-4)


def learns_by_heart(learner: Learner, batch, steps: int = 60, rate: float = 0.01) -> float:
    """The loss of one batch, the same exercise each time, after some steps of AdamW."""
    learner.train()
    inputs, counts = next(learner.objective.exercises(batch, learner))
    optimizer = torch.optim.AdamW(learner.parameters(), lr=rate)
    for _ in range(steps):
        loss = learner.objective.total(learner(*tensors(inputs)), counts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def resumes(train, data: Path, *argv: str) -> Path:
    """Interrupted after half of its steps and resumed, a run is what it would have been, bit for
    bit. Returns its folder."""
    import shutil

    whole, half = train("whole", *argv, data=data), train("half", *argv, data=data)
    shutil.rmtree(half / "step-00000008")
    train("half", *argv, data=data)
    for name in ("model", "heads", "optimizer"):
        files = [run / "step-00000008" / f"{name}.safetensors" for run in (whole, half)]
        assert files[0].exists() == files[1].exists()
        assert not files[0].exists() or files[0].read_bytes() == files[1].read_bytes()
    rows = [
        [
            row | dict(seconds=0, tokens_per_second=0)
            for row in map(json.loads, open(run / "metrics.jsonl"))
        ]
        for run in (whole, half)
    ]
    assert rows[0] == rows[1]
    return whole


def two_processes_as_one(tmp_path: Path, data: Path, *argv: str) -> None:
    """Losses and evaluations of two processes are those of one, up to rounding."""
    (tmp_path / "empty.py").write_text("")
    rows = []
    for name in ("one", "two"):
        out = tmp_path / name
        with on_cpu():  # one GPU serves one process
            given = [str(tmp_path / "empty.py"), f"--data={data}", f"--out={out}", *TINY, *argv]
            if name == "two":
                forked.together(2, "train.py", *given)
            else:
                assert script.main(given) == 0
        rows.append([json.loads(line) for line in open(out / "metrics.jsonl")])
    for one, two in zip(*rows, strict=True):
        for name in one.keys() - {"seconds", "tokens_per_second"}:
            assert two[name] == (one[name] and pytest.approx(one[name], rel=1e-3, abs=1e-5)), name


def evaluates(run: Path, capsys) -> str:
    """evaluate.py says the loss that metrics.jsonl has for the best step; returns what it said."""
    capsys.readouterr()
    device = "cuda" if on_gpu() else "cpu"
    evaluate.main([str(run), "--dtype=float32", f"--device={device}"])
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in open(run / "metrics.jsonl")]
    best = min(row["val_loss"] for row in rows if "val_loss" in row)
    assert f"{best:.4f}" in said
    return said


def is_exported(run: Path, target: Path) -> None:
    """Its trunk, in the layout of transformers, if the shape has one."""
    huggingface.main(["export", str(run), str(target), "--trunk_only"])
    assert (target / "model.safetensors").exists()
