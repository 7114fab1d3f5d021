"""Training, validation and test text: each is what its name says, in preparation and evaluation."""

import json
import math
import re

import pytest
from conftest import make_text, write_shards

import prepare
from dataset import Dataset
from engine.metrics import read_metrics

TEXTS = [make_text(3, seed) for seed in range(200)]


def prepared(folder, name: str, *settings: str) -> dict[str, set[str]]:
    """The documents of each split of a data set made of TEXTS."""
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare.main([str(source), f"--out={folder / name}", "--tokenizer=bytes", *settings])
    data, found = Dataset(str(folder / name)), {}
    for split in ("train", "val", "test"):
        ids = data.split(split).read(0, 10**9).tolist()
        found[split] = set(data.tokenizer.decode(ids).split("<|endoftext|>")[:-1])
    return found


def test_fractions_are_those_of_the_named_splits(tmp_path):
    found = prepared(tmp_path, "a", "--val=0.3", "--test=0.1")
    assert len(found["val"]) == pytest.approx(0.3 * len(TEXTS), abs=16)
    assert len(found["test"]) == pytest.approx(0.1 * len(TEXTS), abs=12)
    assert sorted(text for some in found.values() for text in some) == sorted(TEXTS)


def test_the_seed_decides_which_documents_are_held_back(tmp_path):
    fractions = ["--val=0.3", "--test=0.3"]
    first = prepared(tmp_path, "a", "--seed=0", *fractions)
    again = prepared(tmp_path, "b", "--seed=0", *fractions)
    other = prepared(tmp_path, "c", "--seed=1", *fractions)
    assert first == again
    assert all(first[split] != other[split] for split in first)


@pytest.fixture
def evaluated(train, capsys):
    """evaluated(run, split, data): the loss that --eval_only prints."""

    def loss(split: str, data) -> float:
        capsys.readouterr()
        train("run", "--tokenizer=bytes", "--eval_only=true", f"--split={split}", data=data)
        return float(re.search(r"([\d.]+) nats", capsys.readouterr().out)[1])

    return loss


def test_evaluation_is_on_the_split_that_is_named(train, evaluated, tmp_path):
    """The model knows the training text by heart and no other, and text A better than text B."""
    known, a, b = range(60, 160), [*range(60, 93), *range(100, 160)], range(200, 256)
    data = write_shards(tmp_path / "toy", train=known, val=a, test=b)
    swapped = write_shards(tmp_path / "swapped", train=known, val=b, test=a)
    run = train("run", "--tokenizer=bytes", "--steps=30", data=data)
    losses = {split: evaluated(split, data) for split in ("train", "val", "test")}
    assert losses["train"] < losses["val"] < losses["test"]
    assert evaluated("val", swapped) == losses["test"]
    assert evaluated("test", swapped) == losses["val"]
    last = read_metrics(run)[-1]["val_loss"]
    assert losses["val"] == pytest.approx(last, abs=1e-3)


def test_the_loss_of_a_model_that_knows_nothing_is_exactly_ln_V(train, data):
    """Its head is zero: each token costs ln V, and none is counted twice or left out."""
    run = train("run", "--lr=0", "--embed_lr=0", "--head_lr=0", "--steps=1")
    last = read_metrics(run)[-1]
    split = Dataset(str(data)).split("val")
    assert last["val_loss"] == pytest.approx(math.log(257), rel=1e-5)
    bits = (split.tokens - 1) * math.log2(257)
    assert last["val_bpb"] == pytest.approx(bits / split.text_bytes, rel=1e-5)


@pytest.mark.parametrize("token, sound", [(256, True), (257, False), (65535, False)])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_token_that_the_vocabulary_lacks_is_noticed(train, tmp_path, token, sound, split):
    """Bytes and end-of-text are ids 0 to 256: the vocabulary's size is no id any more."""
    tokens = {name: [*range(60, 160)] for name in ("train", "val")}
    tokens[split][-1] = token  # the last one: wherever it stands, it is looked at
    data = write_shards(tmp_path / "toy", **tokens)
    if sound:
        train("run", "--tokenizer=bytes", "--steps=1", data=data)
        return
    with pytest.raises(ValueError, match=str(token)):
        train("run", "--tokenizer=bytes", "--steps=1", data=data)
    assert not list((tmp_path / "run").glob("step-*"))
