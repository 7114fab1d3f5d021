"""An evaluation is the same whatever bounds its memory; a bounded one is a fair part of it."""

import json
import math
import re

import numpy as np
import pytest
import torch
from promises import plain

import evaluate as script
import scores
from dataset import Dataset
from engine import linear, machine
from engine.checkpoint import load_model
from evaluate import evaluate


@pytest.fixture(scope="module")
def here():
    return machine.pick("cpu", "float32", "false")


@pytest.fixture
def run(train):
    return train("run")


def by_hand(model, split, windows) -> tuple[float, float]:
    """Nats a token and bits a byte over windows (start, length), from softmax, one at a time."""
    nats, tokens, size = 0.0, 0, 0
    for start, length in windows:
        ids = torch.from_numpy(split.read(start, length + 1))
        with torch.no_grad():
            p = model(ids[None, :-1]).double().softmax(-1)[0]
        for i, target in enumerate(ids[1:].tolist()):
            nats -= math.log(p[i, target])
            tokens += 1
            size += target != 256  # of the vocabulary of bytes only end-of-text is no byte
    return nats / tokens, nats / math.log(2) / size


@pytest.mark.parametrize("device_batch", [0, 1, 7])
def test_no_pass_has_more_rows_than_device_batch_and_the_loss_is_the_same(
    run, data, here, device_batch
):
    model, _ = load_model(str(run))
    split = Dataset(str(data)).split("val")
    rows = []
    hook = model.wte.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    loss, bpb = evaluate(plain(model), split, here, None, device_batch).values()
    hook.remove()
    assert max(rows) == device_batch or not device_batch
    expected, _ = by_hand(
        model, split, [(i, min(32, split.tokens - 1 - i)) for i in range(0, split.tokens - 1, 32)]
    )
    assert loss == pytest.approx(expected, rel=1e-5)
    nats = loss * (split.tokens - 1)
    assert bpb == pytest.approx(nats / math.log(2) / split.text_bytes, rel=1e-9)


def test_part_of_an_evaluation_counts_the_bytes_of_what_it_predicts(run, data, here):
    model, _ = load_model(str(run))
    split = Dataset(str(data)).split("val")
    count = math.ceil((split.tokens - 1) / 32)
    windows = [(i * count // 5 * 32, 32) for i in range(5)]
    loss, bpb = evaluate(plain(model), split, here, eval_tokens=5 * 32).values()
    expected = by_hand(model, split, windows)
    assert (loss, bpb) == pytest.approx(expected, rel=1e-5)
    split.text_bytes = None  # as of public shards
    assert evaluate(plain(model), split, here, eval_tokens=160)["val_bpb"] is None


def test_a_bound_above_the_whole_is_the_whole(run, data, here):
    model = plain(load_model(str(run))[0])
    split = Dataset(str(data)).split("val")
    assert evaluate(model, split, here) == evaluate(model, split, here, eval_tokens=10**9)


def test_evaluation_restores_the_mode_of_the_model(run, data, here):
    model, _ = load_model(str(run))
    split = Dataset(str(data)).split("val")
    learner = plain(model)
    for mode in (True, False):
        learner.train(mode)
        evaluate(learner, split, here, eval_tokens=64)
        assert model.training is mode


def test_the_command_evaluates_a_run_on_its_own_data_and_changes_nothing(run, capsys):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    best = min((row for row in rows if "val_loss" in row), key=lambda row: row["val_loss"])
    capsys.readouterr()
    assert script.main([str(run), "--dtype=float32"]) == 0
    said = capsys.readouterr().out
    assert float(re.search(r"([\d.]+) nats a token", said)[1]) == pytest.approx(
        best["val_loss"], abs=1e-4
    )
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    script.main([str(run), "--split=test", "--eval_tokens=64", "--device_batch=1"])
    assert "on the test split" in capsys.readouterr().out


def test_the_command_refuses_data_in_another_vocabulary(run, text_file, tmp_path):
    import prepare

    other = tmp_path / "other"
    prepare.main([str(text_file), f"--out={other}", "--vocab_size=300"])
    with pytest.raises(ValueError, match=f"--tokenizer={run}"):
        script.main([str(run), f"--data={other}"])


def test_the_loss_of_each_position_adds_up_to_the_whole(run, data, here):
    model, _ = load_model(str(run))
    split = Dataset(str(data)).split("val")
    nats = script.window_nats(model, split, here)
    loss, _ = evaluate(plain(model), split, here).values()
    counted = np.isfinite(nats)
    assert counted.sum() == split.tokens - 1
    assert nats[counted].mean() == pytest.approx(loss, rel=1e-5)
    assert script.perplexity_of(nats).value == pytest.approx(math.exp(loss), rel=1e-5)
    expected, _ = by_hand(model, split, [(0, 1)])
    assert nats[0, 0] == pytest.approx(expected, rel=1e-5)
    ranges = dict(map(str.split, script.by_position(nats)))
    assert list(ranges) == ["0", "1", "4", "16"]
    assert float(ranges["4"]) == pytest.approx(np.nanmean(nats[:, 4:16]), abs=0.006)


def test_text_stands_beside_compressors_and_a_baseline(run, train, capsys):
    other = train("other", "--lr=0", "--embed_lr=0", "--head_lr=0")
    capsys.readouterr()
    script.main([str(run), f"--baseline={other}"])
    said = capsys.readouterr().out
    assert re.search(r"compressors: gzip -9 \d\.\d+, xz -9e \d\.\d+", said)
    value, low, high = map(float, re.search(r"perplexity (\S+) \((\S+) to (\S+) by", said).groups())
    assert low < value < high
    assert re.search(r"other has 257\.\d+, which makes -\d.*: they differ", said)
    script.main([str(run), f"--baseline={run}"])
    assert "+0.000 (+0.000 to +0.000): no difference is shown" in capsys.readouterr().out


def test_eight_bits_cost_a_little(train, capsys, monkeypatch):
    """The loss that is told is that of the weights as they are read; a baseline keeps its own."""
    run = train("learned", "--steps=60", "--eval_every=60", "--lr=0.05")
    said, to_127 = [], linear.eight_bits

    def to_7(weight):
        numbers, scales = to_127(weight)
        return (numbers / 18).round().to(torch.int8), scales * 18

    for more in ([], ["--quantize=int8", f"--baseline={run}"], ["--quantize=int8"]):
        if len(said) == 2:
            monkeypatch.setattr(linear, "eight_bits", to_7)
        capsys.readouterr()
        script.main([str(run), "--dtype=float32", "--device=cpu", *more])
        said.append(capsys.readouterr().out)
    whole, eight, four = (float(re.search(r"loss (\S+) nats", text)[1]) for text in said)
    assert whole < 4 and abs(eight - whole) < 0.003 < abs(four - whole)
    whole = float(re.search(r"perplexity (\S+) ", said[0])[1])
    assert f"has {whole:.3f}, which makes" in said[1]


def test_runs_of_another_context_are_not_compared(run, train):
    other = train("other", "--block_size=16")
    with pytest.raises(ValueError, match="a context of 16 tokens, and .* one of 32"):
        script.main([str(run), f"--baseline={other}"])


def test_drawn_texts_stand_beside_human_ones(run, capsys, tmp_path):
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    file = tmp_path / "drawn.jsonl"
    script.main([str(run), "--generate=5", "--max_tokens=20", f"--answers={file}"])
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    assert len(texts) == 5 and len(set(texts)) > 1  # drawn, though temperature is 0 by default
    said = capsys.readouterr().out
    drawn = float(re.search(r"distinct-1 +(\S+) +(\S+)", said)[1])
    assert drawn == pytest.approx(scores.distinct(texts, 1), abs=0.06)
    assert {"distinct-2", "repetition", "self-BLEU"} <= set(re.findall(r"^[\w-]+", said, re.M))


def test_a_text_that_is_drawn_empty_is_one_too(run, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("exam.written", lambda *_: [[], [97, 98, 99], []])
    file = tmp_path / "drawn.jsonl"
    script.main([str(run), "--generate=3", f"--answers={file}"])
    assert [json.loads(line)["text"] for line in file.read_text().splitlines()] == ["", "abc", ""]
    assert "distinct-1" in capsys.readouterr().out
