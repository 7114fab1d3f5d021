"""What docs/scaling.md says follows from the runs that it keeps, and they can be made again."""

import json
import re

import forked
import numpy as np
import pytest
from conftest import ROOT

import plan
from engine.arithmetic import products
from lessons import scaling
from shape import GPTConfig

PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_the_numbers_of_the_page_are_those_of_its_runs():
    for line in "\n".join(scaling.tables(*scaling.read())).splitlines():
        assert line in PAGE.splitlines(), "python -m lessons.scaling"


def test_the_operations_of_the_page_are_those_of_the_formula():
    rows = re.findall(r"^\| (\d+) \| (\d+) \| .+ \| ([\d.]+M) \| ([\d.]+) \|$", PAGE, re.M)
    assert len(rows) == 8
    for T, C, said, ratio in rows:
        T, C = int(T), int(C)
        c = GPTConfig(2048, T, n_layer=4, n_head=C // 32, n_embd=C)
        one = products(GPTConfig(2048, 256, n_layer=4, n_embd=128), 256)
        assert said == plan.words(products(c, T))
        assert float(ratio) == pytest.approx(products(c, T) / one, abs=0.006)


def test_every_run_learned_from_what_its_budget_pays_for():
    rows = [*map(json.loads, scaling.RUNS.read_text(encoding="utf-8").splitlines())]
    found = [((row["layers"], row["width"]), row["budget"], row["tokens"]) for row in rows]
    plain = [(size, budget) for budget, sizes in scaling.BUDGETS.items() for size in sizes]
    others = [((layers, width), budget) for layers, width, budget, _ in scaling.OTHERS]
    assert [run[:2] for run in found] == plain + others
    for size, budget, tokens in found:
        assert abs(tokens - budget / scaling.cost(*size)) <= scaling.BATCH / 2


def test_what_is_predicted_knows_nothing_of_what_came():
    runs, _ = scaling.read()
    before = scaling.curves(runs)
    for budget, columns in runs.items():
        columns[4] += budget > scaling.FITTED
    assert scaling.curves(runs) == before and max(runs) > scaling.FITTED
    runs[scaling.FITTED][4] += 0.1
    assert scaling.curves(runs) != before


def test_the_lowest_points_are_where_they_are():
    N = np.array([1e5, 3e5, 1e6])
    found = scaling.valley(N, 3 + 0.2 * np.log(N / 2.5e5) ** 2)
    assert found == pytest.approx((2.5e5, 3))
    curve, sizes = (1.5, 180, 0.45, 33, 0.17), scaling.KNOWN
    N, D, loss = scaling.lowest(curve, 1e12)
    tried = [scaling.at(curve, scaling.parameters(*x), 1e12 / scaling.cost(*x)) for x in sizes]
    assert loss == pytest.approx(scaling.at(curve, N, D)) and loss <= min(tried) < loss + 0.05


def started(command):
    """As subprocess.run, in a process that has loaded torch before it begins."""
    process = forked.Forked(*command[1:])
    print(process.communicate()[0])
    return process


@pytest.mark.cpu
def test_runs_are_made_by_one_command(data, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scaling, "RUNS", tmp_path / "scaling.jsonl")
    monkeypatch.setattr(scaling, "BUDGETS", {1e9: ((1, 16),)})
    monkeypatch.setattr(scaling, "OTHERS", [(1, 16, 1e9, dict(lr=0.01))])
    monkeypatch.setattr(scaling.subprocess, "run", started)
    scaling.make(str(data))
    plain, other = map(json.loads, scaling.RUNS.read_text().splitlines())
    assert plain["tokens"] == 4 * scaling.BATCH and plain["val_loss"] != other["val_loss"]
    assert f"{plain['val_loss']:.4f} nats" in capfd.readouterr().out
    assert other == plain | dict(lr=0.01) | {x: other[x] for x in ("val_loss", "val_bpb")}
    with pytest.raises(SystemExit):
        scaling.make(str(tmp_path / "nothing"))
