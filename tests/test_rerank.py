"""Re-ranking: of the samples one is kept in proportion to exp(score), and rows are written."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

import prepare
import rerank


class Stub:
    """A judge whose odds of human against machine are the numbers that the texts say."""

    labels = ("human", "machine")

    def of_text(self, text):
        return text

    def __call__(self, rows):
        odds = np.array([float(text) for text in rows])
        return np.stack([odds / (1 + odds), 1 / (1 + odds)], axis=1)


def test_samples_are_kept_in_proportion_to_exp_of_their_score():
    s = SimpleNamespace(keep="drawn", seed=1)
    kept = [rerank.choose(Stub(), ["1", "3", "0"], s, i) for i in range(2000)]
    share = np.bincount(kept, minlength=3) / len(kept)
    np.testing.assert_allclose(share, [0.25, 0.75, 0], atol=0.04)
    assert kept == [rerank.choose(Stub(), ["1", "3", "0"], s, i) for i in range(2000)]
    assert rerank.choose(Stub(), ["1", "3", "0"], SimpleNamespace(keep="best"), 0) == 1


def test_rows_of_both_kinds_teach_a_judge_that_chooses(train, data, tmp_path, capsys):
    writer = train("writer")
    raw, chosen = str(tmp_path / "raw.jsonl"), str(tmp_path / "chosen.jsonl")
    own = ["--given=8", "--tokens=8", "--device=cpu", "--dtype=float32"]
    rerank.main([str(writer), "--samples=1", "--rows=60", f"--out={raw}", *own])
    rows = [json.loads(line) for line in open(raw)]
    assert len(rows) >= 80 and [row["group"] for row in rows[::2]] == [
        r["group"] for r in rows[1::2]
    ]
    for human, machine in zip(rows[::2], rows[1::2], strict=True):
        said = [row["messages"][0]["content"].encode()[:3] for row in (human, machine)]
        assert said[0] == said[1]  # one beginning
        assert [row["messages"][1]["content"] for row in (human, machine)] == ["human", "machine"]
    prepare.main([raw, f"--out={tmp_path}/rows", f"--tokenizer={writer}", "--workers=1"])
    judge = train("judge", "--objective=classify", f"--init_from={writer}", data=tmp_path / "rows")
    capsys.readouterr()
    more = ["--samples=3", "--rows=20", f"--judge={judge}", "--split=val", f"--out={chosen}"]
    rerank.main([str(writer), *own, *more])
    assert "distinct-2" in capsys.readouterr().out
    assert 30 <= sum(1 for _ in open(chosen)) <= 40
    with pytest.raises(ValueError, match="samples=4 should be 1 without --judge"):
        rerank.main([str(writer), "--samples=4"])
    with pytest.raises(ValueError, match="given=32 should be at most 1 here"):
        rerank.main([str(writer), "--samples=1"])
    with pytest.raises(ValueError, match="objective=classify, which writes no text"):
        rerank.main([str(judge), "--samples=1"])
