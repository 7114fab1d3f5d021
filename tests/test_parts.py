"""A large source: parts, several folders as one text, duplicates beyond memory, likeness."""

import json
import random
import re

import numpy as np
import pytest
from conftest import make_text
from promises import resumes
from test_prepare import InProcess, files_of, read

import evaluate
import prepare
from dataset import IGNORE, Dataset
from engine import duplicates, pipeline
from engine.metrics import best_row

WORDS = [
    "".join(random.Random(i).choices("abcdefghijklmnop", k=2 + i % 7)) for i in range(2000)
] + [chr(0x4E00 + i) for i in range(2000)]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(pipeline, "ProcessPoolExecutor", InProcess)


def texts_of(count: int, words: int = 60, seed: int = 0) -> list[str]:
    """Texts that have nothing in common, in two scripts."""
    rng = random.Random(seed)
    halves = [(WORDS[:2000], " "), (WORDS[2000:], "")]
    return [join.join(rng.choices(some, k=words)) for some, join in halves * (count // 2)]


def edited(text: str, changes: int, seed: int) -> str:
    """A copy in which so many words, far from each other, are others."""
    rng = random.Random(seed)
    join = " " if " " in text else ""
    words = text.split(" ") if join else list(text)
    for place in range(len(words) // changes // 2, len(words), len(words) // changes):
        words[place] = rng.choice(WORDS[:2000] if join else WORDS[2000:])
    return join.join(words)


def jsonl(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def joined(folders) -> dict[str, list[str]]:
    found = [read(folder) for folder in folders]
    return {name: sorted(text for some in found for text in some[name]) for name in found[0]}


# --- parts


@pytest.mark.parametrize("kind", ["text", "rows"])
def test_parts_are_disjoint_and_together_the_whole(tmp_path, kind):
    """With duplicates and copies across them, a text to be cut, prompts in two published splits."""
    rng = random.Random(1)
    if kind == "text":
        texts = texts_of(120)
        texts += texts[:20] + [edited(text, 2, seed=3) for text in texts[20:50]]
        texts = [*texts, make_text(600)]
        rng.shuffle(texts)
        sources = [jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])]
        argv = [*sources, "--near=0.7", "--val=0.2", "--test=0.2"]
    else:
        rows = [dict(prompt=f"q{rng.randrange(80)}", answer=str(i % 3)) for i in range(300)]
        rows = [row | dict(group=str(i % 40)) for i, row in enumerate(rows)]
        sources = [f"test={jsonl(tmp_path / 'test.jsonl', rows[:40])}"]
        sources += [f"train={jsonl(tmp_path / 'train.jsonl', rows[40:])}"]
        argv = [*sources, "--prompt=prompt", "--answer=answer", "--group=group", "--val=0.2"]
    prepare.main([*argv, f"--out={tmp_path / 'whole'}", "--tokenizer=bytes"])
    parts = [tmp_path / f"part{k}" for k in range(1, 5)]
    for k in (3, 1, 4, 2):
        argv_of_part = [f"--part={k}/4", f"--out={parts[k - 1]}", "--tokenizer=bytes"]
        prepare.main([*argv, *argv_of_part])
    assert joined(parts) == joined([tmp_path / "whole"])
    assert all(len(read(part)["train"]) > 8 for part in parts)


def test_a_part_is_the_same_whatever_the_order_of_the_source(tmp_path):
    texts = texts_of(80)
    for name, some in (("a", texts), ("b", texts[::-1])):
        source = jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in some])
        prepare.main([source, "--part=2/3", f"--out={tmp_path / name}", "--tokenizer=bytes"])
    assert joined([tmp_path / "a"]) == joined([tmp_path / "b"])


# --- several folders


@pytest.fixture
def two(tmp_path) -> list[str]:
    """Two parts of a text; the first learned the vocabulary of both."""
    source = jsonl(tmp_path / "s.jsonl", [{"text": make_text(6, seed)} for seed in range(300)])
    a, b = str(tmp_path / "x1"), str(tmp_path / "x2")
    prepare.main([source, "--part=1/2", f"--out={a}", "--vocab_size=300"])
    prepare.main([source, "--part=2/2", f"--out={b}", f"--tokenizer={a}"])
    return [a, b]


def test_folders_of_text_are_one_strip(two):
    alone = [Dataset(name).split("val") for name in two]
    split = Dataset(",".join(two)).split("val")
    assert len(split.strips) == 1 and split.text_bytes == sum(s.text_bytes for s in alone)
    ids = np.concatenate([s.read(0, s.tokens) for s in alone])
    targets = np.concatenate([batch.targets.ravel() for batch in split.in_order(4, 32)])
    assert targets[targets != IGNORE].tolist() == ids[1:].tolist()
    train = Dataset(",".join(two)).split("train")
    border = Dataset(two[0]).split("train").tokens
    starts = np.concatenate([train.parts[0].epoch(e, 32, 1) for e in range(8)])
    assert ((starts < border) & (starts + 32 >= border)).any()  # a window goes across
    assert Dataset(",".join(two)).verify() != Dataset(",".join(two[::-1])).verify()


def test_training_on_two_folders_resumes_bit_for_bit(two, train, capsys):
    data = ",".join(two)
    run = resumes(train, data)
    with pytest.raises(ValueError, match="is not what .* was trained on"):
        train("half", "--steps=9", data=",".join(two[::-1]))
    # evaluation is over both
    row = best_row(run)
    capsys.readouterr()
    evaluate.main([str(run), f"--data={data}", "--device=cpu", "--dtype=float32"])
    said = capsys.readouterr().out
    assert float(re.search(r"([\d.]+) nats", said)[1]) == pytest.approx(row["val_loss"], abs=1e-4)
    assert f"{row['val_bpb']:.4f} bits per byte" in said


# --- duplicates


def test_repeats_are_found_exactly_across_all_runs_and_ranges(tmp_path, monkeypatch):
    """Beside a dictionary; one key comes a thousand times, and keys agree in either half."""
    rng = np.random.default_rng(0)
    records = np.zeros(6000, duplicates.RECORD)
    halves = rng.integers(2**64, size=60, dtype=np.uint64)
    records["key"] = halves[rng.integers(60, size=(6000, 2))]
    records["key"][rng.permutation(6000)[:1000]] = halves[:2]
    records["order"] = rng.permutation(6000)
    first: dict[tuple, int] = {}
    for record in np.sort(records, order="order"):
        first.setdefault(tuple(record["key"].tolist()), int(record["order"]))
    wanted = {int(r["order"]) for r in records} - set(first.values())
    for run, at_once in ((1 << 16, 1 << 17), (100, 300), (7, 50)):
        monkeypatch.setattr(duplicates, "RUN", run)
        monkeypatch.setattr(duplicates, "AT_ONCE", at_once)
        blocks = np.split(records, [1, 2000, 2001])
        pairs = list(duplicates.repeats(iter(blocks), 6000, tmp_path / "sorted"))
        later = np.concatenate([pair[0] for pair in pairs]).tolist()
        assert len(later) == len(set(later)) and set(later) == wanted
        assert all((before < after).all() for after, before in pairs)
    assert not (tmp_path / "sorted").exists()


def test_a_set_is_the_same_beyond_the_bound_of_memory(tmp_path, monkeypatch):
    texts = texts_of(300, words=12)
    texts += [*texts[::3], *[edited(text, 1, 5) for text in texts[::7]]]
    source = jsonl(tmp_path / "s.jsonl", [{"text": text} for text in texts])
    for name, bound in (("a", 1 << 17), ("b", 64)):
        monkeypatch.setattr(duplicates, "AT_ONCE", bound)
        monkeypatch.setattr(duplicates, "RUN", min(bound, 1 << 16))
        argv = [source, f"--out={tmp_path / name}", "--near=0.3", "--tokenizer=bytes"]
        prepare.main(argv)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


# --- likeness


@pytest.mark.parametrize("likeness", [0.5, 0.7, 0.8, 0.9])
def test_texts_meet_in_a_band_as_often_as_the_theory_says(likeness, tmp_path):
    """And signatures estimate the likeness, for sets of 200 shingles of which a share is common."""
    rng, pairs, bands = np.random.default_rng(1), 500, 16
    common = round(200 * 2 * likeness / (1 + likeness))
    signatures = []
    for _ in range(pairs):
        shingles = rng.integers(2**64, size=400 - common, dtype=np.uint64)
        for some in (shingles[:200], shingles[-200:]):
            signatures.append(duplicates.Shingles())
            signatures[-1].add(some)
    table = np.stack([some.least for some in signatures])
    true = common / (400 - common)
    estimates = (table[::2] == table[1::2]).mean(1)
    assert estimates.mean() == pytest.approx(true, abs=0.006)
    assert estimates.std() == pytest.approx(
        (true * (1 - true) / duplicates.HASHES) ** 0.5, rel=0.15
    )
    records = duplicates.band_keys(table, np.arange(2 * pairs, dtype=np.uint64), bands)
    met = set()
    for later, first in duplicates.repeats([records], len(records), tmp_path / "sorted"):
        assert (later == first + 1).all() and (first % 2 == 0).all()  # the two of a pair, no others
        met |= set(first.tolist())
    wanted = 1 - (1 - true ** (duplicates.HASHES // bands)) ** bands
    deviation = (wanted * (1 - wanted) / pairs) ** 0.5
    assert len(met) / pairs == pytest.approx(wanted, abs=3.5 * deviation + 1e-9)


def test_edited_copies_are_left_out_and_no_others(tmp_path, capsys):
    """One word of 60 changed: 51 shingles of 61 are common, 0.84. Four: about 0.5, which meet in a
    band in four cases of five, and stay."""
    texts = texts_of(200)
    copies = [edited(text, 1, seed=1) for text in texts[:100]]
    others = [edited(text, 4, seed=2) for text in texts[:100]]
    source = jsonl(
        tmp_path / "s.jsonl", [{"text": t} for t in [*texts, *copies, *others, "!?", "?"]]
    )
    argv = [source, "--near=0.7", "--tokenizer=bytes", "--val=0.3", "--test=0.3"]
    prepare.main([*argv, f"--out={tmp_path / 'out'}"])
    kept = {text for some in read(tmp_path / "out").values() for text in some}
    assert {*texts, *others, "!?", "?"} <= kept
    left = len(set(copies) - kept)
    assert left >= 95
    said = capsys.readouterr().out
    assert f"{left} near-duplicate documents" in said
    # each copy is drawn anew: of two, 1 - 0.4^2 - 0.3^2 - 0.3^2 = 0.66 stand apart
    crossed = int(re.search(r"(\d+) of them would", said)[1])
    assert crossed == pytest.approx(0.66 * left, abs=18)


def test_of_likes_in_published_splits_train_leaves(tmp_path):
    texts = texts_of(60)
    copies = [edited(text, 1, seed=1) for text in texts]
    train = [{"text": text} for text in [*texts, *texts_of(20, seed=9)]]
    sources = [f"train={jsonl(tmp_path / 'train.jsonl', train)}"]
    sources += [f"test={jsonl(tmp_path / 'test.jsonl', [{'text': text} for text in copies])}"]
    argv = [*sources, "--near=0.6", "--val=0", "--tokenizer=bytes"]
    prepare.main([*argv, f"--out={tmp_path / 'out'}"])
    found = read(tmp_path / "out")
    assert sorted(found["test"]) == sorted(copies)
    assert len(set(found["train"]) & set(texts)) <= 3 and len(found["train"]) >= 20


def test_of_a_source_all_of_which_is_like_a_test_nothing_is_left(tmp_path, capsys):
    texts = texts_of(20)
    copies = [{"text": edited(text, 1, seed=1)} for text in texts]
    test = f"test={jsonl(tmp_path / 'test.jsonl', copies)}"
    more = jsonl(tmp_path / "more.jsonl", [{"text": text} for text in texts])
    argv = [test, "--near=0.3", "--val=0", "--tokenizer=bytes", f"--out={tmp_path / 'out'}"]
    with pytest.raises(ValueError, match="nothing is left to train on"):
        prepare.main([f"train={more}", *argv])
    train = [{"text": text} for text in texts_of(20, seed=9)]
    prepare.main([f"train={jsonl(tmp_path / 'train.jsonl', train)}", str(more), *argv])
    assert len(read(tmp_path / "out")["train"]) == 20
