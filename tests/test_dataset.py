"""Shards hold what was written; batches are a pure function and show every token once an epoch."""

import json

import numpy as np
import pytest
from conftest import ROOT

import dataset
from dataset import IGNORE, Dataset, Split, epoch_order, windows_per_epoch
from engine import shards
from engine.prepared import Folder
from engine.shards import ShardWriter, Strip, open_shard


def write_split(folder, tokens, vocab_size=1000, name="train") -> Split:
    writer = ShardWriter(folder, name, vocab_size)
    writer.write(np.asarray(tokens))
    writer.close()
    return Split([Strip([folder / shard["file"] for shard in writer.shards])])


@pytest.mark.parametrize("vocab_size, width", [(65536, 2), (65537, 4)])
def test_shards_have_the_layout_of_llm_c(tmp_path, vocab_size, width):
    write_split(tmp_path, [1, 2, vocab_size - 1], vocab_size)
    raw = (tmp_path / "train_000000.bin").read_bytes()
    magic = {2: (20240520, 1), 4: (20240801, 7)}[width]
    assert tuple(np.frombuffer(raw, "<i4", 3)) == (*magic, 3)
    assert len(raw) == 1024 + 3 * width
    assert np.frombuffer(raw, f"<u{width}", offset=1024).tolist() == [1, 2, vocab_size - 1]


def test_several_shards_read_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 10)
    split = write_split(tmp_path, np.arange(47))
    assert len(split.strips[0].shards) == 5 and split.tokens == 47
    for start in range(47):
        for count in (1, 5, 25):
            assert split.read(start, count).tolist() == list(range(start, min(47, start + count)))


@pytest.mark.parametrize("damage", ["short", "long", "magic", "empty", "header only"])
def test_a_damaged_shard_is_named(tmp_path, damage):
    write_split(tmp_path, range(100))
    path = tmp_path / "train_000000.bin"
    raw = path.read_bytes()
    damaged = {"short": raw[:-1], "long": raw + b"x", "magic": b"x" + raw[1:], "empty": b""}
    path.write_bytes((damaged | {"header only": raw[:100]})[damage])
    with pytest.raises(ValueError, match="train_000000.bin"):
        open_shard(path)


def test_an_epoch_shows_every_window_once_and_the_next_has_another_phase(tmp_path):
    n, block = 1003, 10
    split = write_split(tmp_path, np.arange(n))
    per_epoch = windows_per_epoch(n, block)
    assert per_epoch == (n - block) // block
    phases = set()
    for epoch in range(8):
        starts = epoch_order(n, block, 5, epoch)
        phase = min(starts)
        phases.add(int(phase))
        assert sorted(starts) == [phase + block * i for i in range(per_epoch)]
        assert phase >= 0 and max(starts) + block < n
    assert len(phases) > 3
    # the same, seen through batches that go across the ends of epochs: 7 does not divide 99
    firsts = [int(x[0]) for step in range(99) for x in split.batch(step, 7, block, 5)[0]]
    expected = [int(s) for epoch in range(7) for s in epoch_order(n, block, 5, epoch)]
    assert firsts == expected


@pytest.mark.parametrize("n", [5, 7, 20, 23])
def test_every_token_but_the_first_is_learned_in_some_epoch(n):
    targets = set()
    for epoch in range(200):
        for start in epoch_order(n, 4, 5, epoch):
            targets.update(range(start + 1, start + 5))
    assert targets == {*range(1, n)}


def test_each_epoch_of_each_of_many_folders_is_shuffled_once(tmp_path, monkeypatch):
    shuffled = []

    def counted(*arguments) -> np.ndarray:
        shuffled.append(arguments)
        return epoch_order(*arguments)

    monkeypatch.setattr(dataset, "epoch_order", counted)
    write_split(tmp_path, np.arange(1000))
    split = Split([Strip([tmp_path / "train_000000.bin"]) for _ in range(6)])
    for step in range(10):  # 120 of about 370 windows
        split.batch(step, 12, 16, seed=0)
    assert len(shuffled) == 6


def test_targets_are_inputs_moved_by_one(tmp_path):
    split = write_split(tmp_path, np.arange(500))
    x, y, positions, mask, keys = split.batch(3, 4, 16, seed=0)
    assert positions is None and mask is None  # positions as they stand, and causal
    assert keys == [(0, number) for number in range(12, 16)]
    assert x.shape == y.shape == (4, 16) and x.dtype == y.dtype == np.int64
    assert (y == x + 1).all()


def test_batches_depend_on_seed_and_step_alone(tmp_path):
    split = write_split(tmp_path, np.arange(5000) % 1000)
    later = split.batch(11, 8, 16, seed=1)[0]
    for step in range(11):
        split.batch(step, 8, 16, seed=2)
        list(split.in_order(4, 16))
    assert (split.batch(11, 8, 16, seed=1)[0] == later).all()
    assert not (split.batch(11, 8, 16, seed=2)[0] == later).all()
    assert not (split.batch(12, 8, 16, seed=1)[0] == later).all()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_one_global_batch(tmp_path, world):
    split = write_split(tmp_path, np.arange(5000) % 1000)
    whole = split.batch(7, 8, 16, seed=1)[0]
    shares = [split.batch(7, 8, 16, 1, rank, world)[0] for rank in range(world)]
    assert (np.concatenate(shares) == whole).all()


@pytest.mark.parametrize("most", [1, 16, 50, 160, 998, 999, 5000])
@pytest.mark.parametrize("world", [1, 3])
def test_part_of_an_evaluation_is_spread_evenly_whatever_the_number_of_processes(
    tmp_path, most, world
):
    split = write_split(tmp_path, np.arange(1000))
    found = []
    for rank in range(world):
        for _, y, *_ in split.in_order(2, 16, rank, world, most):
            found += y[y != IGNORE].tolist()
    firsts = sorted(i for i in found if i % 16 == 1)  # of the windows, which are 63
    alone = [y[y != IGNORE].tolist() for _, y, *_ in split.in_order(99, 16, most=most)]
    assert sorted(found) == sorted(i for some in alone for i in some)
    if most >= 999:
        assert sorted(found) == list(range(1, 1000))
    else:
        assert len(firsts) == max(1, most // 16) and len(found) <= max(16, most)
        gaps = np.diff([*firsts, 1001 + 16 - 1001 % 16 - 15])
        assert max(gaps) - min(gaps) <= 2 * 16


def test_bytes_of_tokens_are_those_of_the_text_without_its_ends(data):
    split = Dataset(str(data)).split("val")
    assert split.bytes_of(np.array([*"文 a".encode(), 256, *b"b", 256])) == 6
    assert split.bytes_of(np.array([256])) == 0


@pytest.mark.parametrize("n", [2, 16, 17, 18, 33, 100])
@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_predicts_every_token_but_the_first_once(tmp_path, n, world):
    split = write_split(tmp_path, np.arange(n))
    predicted = []
    for rank in range(world):
        for x, y, *_ in split.in_order(2, 16, rank, world):
            assert x.shape == y.shape and x.shape[1] == 16
            counted = y != IGNORE
            assert (y[counted] == x[counted] + 1).all()
            predicted += y[counted].tolist()
    assert sorted(predicted) == list(range(1, n))


def test_the_smallest_data_set_is_one_window(tmp_path):
    split = write_split(tmp_path, np.arange(17))
    assert split.batch(0, 3, 16, seed=0)[0].tolist() == [list(range(16))] * 3


def write_public(folder, name, tokens=range(200)) -> None:
    write_split(folder, tokens, name=name)
    (folder / f"{name}_000000.bin").rename(folder / f"{name}.bin")


def test_public_shards_train_with_a_named_vocabulary(tmp_path):
    for name in ("fineweb_train_000001", "fineweb_val_000000"):
        write_public(tmp_path, name)
    data = Dataset(str(tmp_path), "bytes")
    assert data.split("train").tokens == data.split("val").tokens == 200
    assert data.split("val").text_bytes is None
    assert len(data.verify()) == 64
    with pytest.raises(ValueError, match="--tokenizer=gpt2"):
        Dataset(str(tmp_path))


def test_the_recipe_for_nanogpts_files_makes_shards_of_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        np.arange(200, dtype="<u2").tofile(f"{split}.bin")
    page = (ROOT / "docs" / "nanogpt.md").read_text(encoding="utf-8")
    exec(page.partition("```python\n")[2].partition("```")[0], {})
    data = Dataset("data/mine", "bytes")
    assert all(data.split(s).read(0, 200).tolist() == [*range(200)] for s in ("train", "val"))


@pytest.mark.parametrize("token", [257, 300])  # the first id that the vocabulary lacks, and more
def test_a_token_beyond_the_vocabulary_is_named(tmp_path, token):
    write_public(tmp_path, "fineweb_train_000001", [0, 256])
    Dataset(str(tmp_path), "bytes").verify()
    write_public(tmp_path, "fineweb_train_000001", [0, token])
    with pytest.raises(ValueError, match=f"holds token {token}"):
        Dataset(str(tmp_path), "bytes").verify()


def test_public_shards_belong_to_the_split_that_their_name_says_as_a_word(tmp_path):
    names = dict(train=["contest_train_000001", "retrieval_train_000000"], test=["latest-test1"])
    names |= dict(val=["TinyStories_val", "train_set_validation"])
    for name in sum(names.values(), ["interval_000000"]):
        write_public(tmp_path, name)
    expected = {split: [f"{name}.bin" for name in some] for split, some in names.items()}
    found = Dataset(str(tmp_path), "bytes").folders[0].files
    assert {split: sorted(some) for split, some in found.items()} == {
        split: sorted(some) for split, some in expected.items()
    }


def test_a_tokenizer_beside_data_that_have_their_own_is_not_ignored(data):
    Dataset(str(data), "bytes")
    Dataset(str(data), str(data))
    with pytest.raises(ValueError, match="unknown tokenizer 'gpt5x'"):
        Dataset(str(data), "gpt5x")


def test_another_tokenizer_beside_data_that_have_their_own_is_refused(data, tmp_path):
    from bpe import bpe_tokenizer

    bpe_tokenizer({"low": 5, "lower": 2}, 260).save(tmp_path)
    with pytest.raises(ValueError, match="has its own: leave it out"):
        Dataset(str(data), str(tmp_path))


def test_a_data_folder_reads_no_file_outside_of_it(data, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    text = (copy / "meta.json").read_text(encoding="utf-8")
    (copy / "meta.json").write_text(text.replace("val_000000.bin", "../../val_000000.bin"))
    (tmp_path.parent / "val_000000.bin").write_bytes((data / "val_000000.bin").read_bytes())
    assert Dataset(str(copy)).split("val").strips[0].paths == [copy / "val_000000.bin"]


def test_the_message_about_another_tokenizer_has_the_command_that_prepares_anew(data, tmp_path):
    import shlex

    import prepare
    from bpe import bpe_tokenizer

    other = bpe_tokenizer({"low": 5, "lower": 2}, 260)
    run = tmp_path / "a run"
    run.mkdir()
    other.save(run)
    with pytest.raises(ValueError, match="260 tokens.*257 tokens") as e:
        Dataset(str(data)).require_tokenizer(other, str(run))
    python, script, *argv = shlex.split(str(e.value).split("`")[1])
    assert (python, script) == ("python", "prepare.py")
    prepare.main(argv)
    out = next(word[6:] for word in argv if word.startswith("--out="))
    Dataset(out).require_tokenizer(other, str(run))


def test_that_command_has_all_that_decides_what_is_in_a_set(data):
    folder = Folder(str(data))
    folder.made |= dict(lines=True, images=16, noise=0.25, skip_bad=True)
    words = folder.command().split()
    assert {"--lines=True", "--images=16", "--noise=0.25", "--skip_bad=True"} <= set(words)
    folder.made |= dict(lines=False, images=0, noise=0.0, skip_bad=False)
    assert not [w for w in folder.command().split() if w[2:6] in ("line", "imag", "nois", "skip")]


def test_every_flipped_bit_is_noticed(data, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    digest = Dataset(str(data)).verify()
    for file in ["train_000000.bin", "val_000000.bin", "vocab.tiktoken", "encoding.json"]:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(data, copy)
        assert Dataset(str(copy)).verify() == digest
        raw = bytearray((copy / file).read_bytes())
        raw[len(raw) // 2] ^= 4
        (copy / file).write_bytes(raw)
        with pytest.raises(ValueError):
            Dataset(str(copy)).verify()


def test_meta_json_tells_tokens_bytes_and_documents(data, text_file):
    meta = json.loads((data / "meta.json").read_text(encoding="utf-8"))
    splits = meta["splits"]
    size = len(text_file.read_bytes())
    assert sum(split["bytes"] for split in splits.values()) == size
    assert all(s["tokens"] == s["bytes"] + s["documents"] for s in splits.values())  # end-of-text
    assert meta["vocab_size"] == 257 and meta["settings"]["tokenizer"] == "bytes"
