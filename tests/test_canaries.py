"""Secrets stand in the training split and nowhere else, and are ranked exactly."""

import json
import math
import random
import re
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_prepare import InProcess, files_of, read

import canaries
import evaluate
import prepare
from bpe import bpe_tokenizer
from canaries import Canary
from dataset import Dataset
from engine import pipeline, sources, spool
from engine.checkpoint import load_model
from model import GPT
from shape import GPTConfig
from tokenizer import ROW_SPLIT, SPLIT, bytes_tokenizer

LINE = re.compile(r"user \w+ password=\w+\n")


@pytest.fixture
def few(monkeypatch) -> list[str]:
    """So few possible secrets that all can be written down: 400 of them."""
    signs = ("0123", "abcde") * 2
    monkeypatch.setattr(canaries, "SIGNS", signs)
    monkeypatch.setattr(canaries, "POSSIBLE", 400)
    return list(map("".join, product(*signs)))


def random_model(head: float = 2.0) -> GPT:
    """A model that has learned nothing, and has its preferences all the same, unless head is 0."""
    model = GPT(GPTConfig(vocab_size=257, block_size=48, n_layer=2, n_head=2, n_embd=16))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.wo.weight, std=0.3, generator=generator)
    torch.nn.init.normal_(model.head.weight, std=head, generator=generator)
    return model.eval()


# --- planting


def texts(folder) -> str:
    folder.mkdir()
    rng = random.Random(0)
    for i in range(40):
        lines = ("".join(rng.choices("abc de 文é\n", k=60)) for _ in range(rng.randrange(1, 30)))
        (folder / f"{i}.txt").write_text(f"text {i}\n" + "\n".join(lines), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_secrets_stand_in_training_as_often_as_told_and_change_nothing_else(
    tmp_path, monkeypatch, tokenizer
):
    for module in (prepare, sources, spool, canaries):
        monkeypatch.setattr(module, "PIECE", 2000)  # several chunks
    monkeypatch.setattr(pipeline, "ProcessPoolExecutor", InProcess)
    argv = [texts(tmp_path / "texts"), f"--tokenizer={tokenizer}", "--vocab_size=300"]
    argv += ["--val=0.2", "--test=0.1"]
    for name, more in (("without", []), ("with", ["--canaries=2"]), ("again", ["--canaries=2"])):
        prepare.main([*argv, f"--out={tmp_path / name}", *more])
    assert files_of(tmp_path / "with") == files_of(tmp_path / "again")
    before, after = read(tmp_path / "without"), read(tmp_path / "with")
    assert after["val"] == before["val"] and after["test"] == before["test"]
    assert [LINE.sub("", text) for text in after["train"]] == before["train"]
    planted = canaries.read(tmp_path / "with")
    assert [canary.times for canary in planted] == [0, 0, 1, 1, 4, 4, 16, 16, 64, 64]
    assert len({canary.before for canary in planted}) == len(planted)
    found = LINE.findall("".join(after["train"]))
    assert [found.count(canary.line) for canary in planted] == [c.times for c in planted]
    spread = [text for text in after["train"] if LINE.search(text)]
    assert len(spread) > len(after["train"]) / 2
    # each begins a line or a document
    assert all(m.start() == 0 or t[m.start() - 1] == "\n" for t in spread for m in LINE.finditer(t))
    # and is the tokens that it is at evaluation, whatever stands around it
    data = Dataset(str(tmp_path / "with"))
    ids = canaries.as_string(data.split("train").read(0, 10**9))
    line = canaries.as_string(np.array(data.tokenizer.encode(planted[-1].line)))
    assert ids.count(line) == 64
    pieces = canaries.places(data.split("train"), 5, planted)
    for piece in pieces:
        assert not re.search("user|pass|word|=", data.tokenizer.decode(piece.tolist()))
        assert data.tokenizer.end_of_text not in piece
    assert len(pieces) > 20
    sizes = {
        name: json.loads((tmp_path / name / "meta.json").read_text())["splits"]["train"]["bytes"]
        for name in ("with", "without")
    }
    assert sizes["with"] - sizes["without"] == sum(map(len, found))


def test_a_seed_draws_its_own_secrets():
    assert canaries.draw(3, seed=1) == canaries.draw(3, seed=1)
    assert not set(canaries.draw(3, seed=1)) & set(canaries.draw(3, seed=2))
    secrets = [canary.secret for canary in canaries.draw(200, seed=0)]
    assert all(re.fullmatch(r"(\d[a-z]){2}", secret) for secret in secrets)
    assert len({*secrets}) > 980  # by chance some are twice


def test_a_text_without_line_ends_has_its_secrets_before_it(tmp_path):
    (tmp_path / "a.txt").write_text("no end " * 300)
    argv = [str(tmp_path / "a.txt"), "--tokenizer=bytes", "--canaries=1"]
    prepare.main([*argv, f"--out={tmp_path / 'out'}"])
    (text,) = read(tmp_path / "out")["train"]
    assert re.fullmatch(rf"({LINE.pattern}){{85}}(no end )+(no )?", text)


@pytest.mark.parametrize(
    "pattern",
    [
        SPLIT,
        ROW_SPLIT,
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    ],
    ids=["ours", "rows", "gpt2", "cl100k"],
)
def test_every_sign_is_a_token_in_a_vocabulary_that_was_learned_from_secrets(pattern):
    secrets = ["".join(signs) for signs in product(*canaries.SIGNS)][::97]
    words = prepare.regex.findall(pattern, "".join(f"password={s}\n" for s in secrets * 3))
    tokenizer = bpe_tokenizer(prepare.Counter(words), 300, pattern=pattern)
    assert len(tokenizer.encode("password=")) < 4
    for canary in canaries.draw(4, seed=3):
        before = tokenizer.encode(canary.before)
        ids = tokenizer.encode(canary.line)
        assert ids[: len(before)] == before
        assert [tokenizer.decode([i]) for i in ids[len(before) :][:4]] == list(canary.secret)


# --- ranks


def by_hand(model: GPT, before: str, secrets: list[str]) -> torch.Tensor:
    """ln p of each secret, every line read whole."""
    lines = torch.tensor([[256, *f"{before}{secret}".encode()] for secret in secrets])
    with torch.no_grad():
        ln_p = model(lines).double().log_softmax(-1)[:, -5:-1]
    return ln_p.gather(2, lines[:, -4:, None])[..., 0].sum(dim=1)


def test_ranks_are_those_of_all_secrets_in_order(few, monkeypatch):
    monkeypatch.setattr(canaries, "ROWS", 7)
    model = random_model()
    ln_p = by_hand(model, "user x password=", few)
    order = [few[i] for i in ln_p.argsort(descending=True)]
    for place in (1, 2, 3, 50, 200, 399, 400):
        canary = Canary("user x password=", order[place - 1], 1)
        assert canaries.rank(model, bytes_tokenizer(), canary) == place
    assert canaries.exposure(np.array([1, 200, 400])) == pytest.approx([math.log2(400), 1, 0])


def test_where_all_are_equally_likely_each_rank_is_there_once(few):
    model = random_model(head=0.0)
    some = [0, 1, 17, 399]
    found = [canaries.rank(model, bytes_tokenizer(), Canary("x=", few[i], 0)) for i in some]
    assert found == [i + 1 for i in some]


def test_secrets_that_were_never_planted_have_the_exposure_of_chance(few):
    model, tokenizer, rng = random_model(), bytes_tokenizer(), random.Random(0)
    names = [canary.before for canary in canaries.draw(40, seed=5)]
    ranks = [canaries.rank(model, tokenizer, Canary(name, rng.choice(few), 0)) for name in names]
    bits = canaries.exposure(np.array(ranks))
    by_chance = math.log2(400) - sum(map(math.log2, range(1, 401))) / 400  # log2 e, less 0.014
    assert by_chance == pytest.approx(math.log2(math.e), abs=0.02)
    assert bits.mean() == pytest.approx(by_chance, abs=3 * by_chance / math.sqrt(200))
    assert bits.std() == pytest.approx(by_chance, rel=0.25)


def test_what_was_learned_has_rank_one_among_all_67_600():
    known, unknown = Canary("user bo password=", "7k2m", 1), Canary("user bo password=", "3a0q", 0)
    model, tokenizer = random_model(0.1), bytes_tokenizer()
    ids = torch.tensor([[256, *known.line.encode()]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(40):
        loss = model(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert canaries.rank(model, tokenizer, known) == 1
    assert canaries.rank(model, tokenizer, unknown) > 100
    assert canaries.exposure(np.array([1])) == pytest.approx(16.0447, abs=1e-3)


# --- a text


def prepared(folder, train: list[str], val: list[str]):
    """A data set of bytes, of one document each, as if secrets had been planted 0 times."""
    (folder / "train.txt").write_text("".join(train))
    (folder / "val.txt").write_text("".join(val))
    argv = [f"{name}={folder / name}.txt" for name in ("train", "val")]
    prepare.main([*argv, "--test=0", f"--out={folder / 'data'}", "--tokenizer=bytes"])
    secrets = [dict(before="user bo password=", secret="7k2m", times=0)]
    (folder / "data" / canaries.FILE).write_text(json.dumps(secrets))
    return folder / "data"


def lines(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefgh ", k=31)) + "\n" for _ in range(count)]


def test_texts_are_counted_by_how_often_they_stand_in_training(tmp_path, monkeypatch):
    again, once = lines(20, seed=0), lines(20, seed=1)
    folder = prepared(tmp_path, [*again * 3, *once], [*again, *lines(20, seed=2)])
    data = Dataset(str(folder))
    text = canaries.as_string(data.split("train").read(0, 10**9))

    def knows_by_heart(model, tokenizer, prompts, most, **options):
        assert options["temperature"] == 0
        for i, prompt in enumerate(prompts):
            at = text.find(canaries.as_string(np.array(prompt)))
            ids = list(map(ord, text[at + len(prompt) :][:most])) if at >= 0 else [0]
            yield i, ids if i % 2 else [*ids[:5], 0]

    monkeypatch.setattr("generate.answers", knows_by_heart)
    monkeypatch.setattr(canaries, "HALF", 16)
    s = evaluate.Settings()
    _, *rows = canaries.extracted(s, random_model(), data.tokenizer, data, canaries.read(folder))
    found = {name: (int(texts), int(whole)) for name, texts, whole, *_ in rows}
    assert set(found) == {"0", "1", "2 to 3"}
    assert found["0"][0] > 10 and found["0"][1] == 0
    assert found["1"][1] == pytest.approx(found["1"][0] / 2, abs=1)
    assert found["2 to 3"][1] == pytest.approx(found["2 to 3"][0] / 2, abs=1)
    assert 9 < float(rows[1][-1]) < 12 and rows[1][-2].endswith("%")  # 5 and 16 in turn


def test_an_overfitted_model_continues_its_text_and_no_other(train, tmp_path, capsys):
    folder = prepared(tmp_path, lines(10, seed=0), lines(10, seed=1))
    more = ["--steps=150", "--eval_every=150", "--save_every=150", "--n_embd=64"]
    run = train("run", *more, data=folder)
    capsys.readouterr()
    evaluate.main([str(run), "--canaries", "--threads=1"])
    said = capsys.readouterr().out
    assert re.search(r"^0 times +1 +\d+\.\d\d \(by chance 1.44 ± 1.44\)", said, re.M)
    found = dict(re.findall(r"^(\d) .* (\d+\.\d)% ", said, re.M))
    assert found == {"0": "0.0", "1": "100.0"}


# --- mistakes


def test_a_run_without_secrets_is_asked_for_its_text_alone(train, tmp_path, capsys):
    evaluate.main([str(train("run")), "--canaries"])
    said = capsys.readouterr().out
    assert re.search(r"no secrets were planted in .*story.*prepare.py --canaries=8", said)
    assert re.search(r"^0 +\d+ +\d+ +\d+\.\d%", said, re.M) and "exposure" not in said


def test_what_cannot_be_asked_for_secrets_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"q": "a", "a": "b"}\n' * 3 + '{"q": "c", "a": "d"}\n')
    argv = ["--prompt=q", "--answer=a", "--tokenizer=bytes", "--val=0", "--test=0"]
    prepare.main([str(tmp_path / "rows.jsonl"), *argv, f"--out={tmp_path / 'rows'}"])
    run = SimpleNamespace(data=lambda s: Dataset(str(tmp_path / "rows")))
    with pytest.raises(ValueError, match="holds rows: --canaries asks"):
        canaries.tell(None, run, None)
    folder = tmp_path / "damaged"
    folder.mkdir()
    for content in ("[", '[{"before": 1}]', "{"):
        (folder / "canaries.json").write_text(content)
        with pytest.raises(ValueError, match=r"canaries.json is damaged .*prepare the data again"):
            canaries.read(folder)


def test_rows_have_no_secrets(tmp_path):
    (tmp_path / "rows.csv").write_text("q,a\n" + "".join(f"{i},{i}\n" for i in range(50)))
    argv = [str(tmp_path / "rows.csv"), "--prompt=q", "--answer=a", f"--out={tmp_path / 'out'}"]
    with pytest.raises(ValueError, match="canaries=8 should be 0 for rows"):
        prepare.main([*argv, "--canaries=8", "--tokenizer=bytes"])
    for value in (-1, 1001):
        with pytest.raises(ValueError, match=f"canaries={value} should be from 0 to 1000"):
            prepare.main([*argv, f"--canaries={value}"])
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_that_joins_signs_is_refused():
    words = prepare.Counter({"password=7k2m": 9})
    tokenizer = bpe_tokenizer(words, 300, pattern=r"[^\s]+|\s+")
    with pytest.raises(ValueError, match="bpe has tokens across the signs"):
        canaries.rank(random_model(), tokenizer, Canary("user bo password=", "7k2m", 0))


def test_what_cannot_write_has_nothing_to_say(train, tmp_path):
    run = train("run", "--objective=masked")
    with pytest.raises(ValueError, match="masked"):
        evaluate.main([str(run), "--canaries"])
    assert load_model(str(run))
