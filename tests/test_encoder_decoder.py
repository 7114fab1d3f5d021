"""Encoder and decoder: who sees whom, packed as alone, and answers that are what the loss is of."""

import json
import math

import promises
import pytest
import torch
from test_rows import BYTES, PAIRS, save, talk

import prepare
import seq2seq
from dataset import IGNORE
from grading import Row

SIZE = ["--block_size=64", "--batch_tokens=512"]
ARGV = ["--objective=encoder_decoder", "--encoder_layers=1", *SIZE]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """300 questions of two tasks."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [talk(*pair, task="b" if i % 4 else "a") for i, pair in enumerate(PAIRS)]
    prepare.main([save(folder / "chat.jsonl", rows), f"--out={folder / 'chat'}", *BYTES])
    return folder / "chat"


@pytest.fixture
def made(chat):
    """Without the zeros that weights begin with, everything depends on everything."""
    learner, batch = promises.make(chat, *ARGV)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in learner.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return learner.eval(), batch


def test_prompts_go_to_the_encoder_and_answers_to_the_decoder(made):
    learner, batch = made
    inputs, counts = learner.objective.prepare(batch, learner)
    prompt, _, prompt_row, answer, _, row, targets = inputs
    t = learner.objective.tokenizer
    markers = t.markers
    assert counts == [(batch.targets != IGNORE).sum()] == [(targets != IGNORE).sum()]
    for i in range(len(prompt)):
        for number in range(1, row[i].max() + 1):
            asked = prompt[i][prompt_row[i] == number].tolist()
            said = answer[i][row[i] == number].tolist()
            follows = targets[i][row[i] == number].tolist()
            assert asked[0] in t.tasks().values() and asked[1] == markers.user
            assert asked[-1] == markers.end
            assert said[0] == markers.assistant and said[-1] == markers.end
            assert follows == [*said[1:], IGNORE]
    assert "-> <|assistant|>it is" in learner.objective.shown(inputs, 0)


def test_the_loss_begins_at_ln_v_and_one_batch_is_learned_by_heart(chat):
    made = promises.make(chat, *ARGV)
    vocabulary = made[0].objective.tokenizer.vocab_size
    assert promises.means(*made)["total"] == pytest.approx(math.log(vocabulary), rel=1e-4)
    assert promises.learns_by_heart(*made, steps=40) < 1.5


def test_rows_of_a_window_cost_what_each_of_them_costs_alone(made):
    learner, batch = made
    t = learner.objective.tokenizer
    packed = promises.means(*made)["total"] * (batch.targets != IGNORE).sum()
    alone = 0.0
    for tokens in batch.tokens.tolist():
        text = [i for i in tokens if i != t.end_of_text] + [t.end_of_text]
        starts = [i for i, token in enumerate(text) if token in t.tasks().values()]
        for start, end in zip(starts, [*starts[1:], len(text) - 1], strict=True):
            middle = text.index(t.markers.assistant, start)
            with torch.no_grad():
                read = seq2seq.encoded(learner, [text[start:middle]])
                answers = [text[middle + 1 : end]]
                alone += float(seq2seq.surprise(learner, t.markers.assistant, *read, answers))
    assert packed == pytest.approx(alone, rel=1e-4)


def test_an_answer_sees_all_of_its_prompt_and_nothing_that_comes(made):
    learner = made[0]
    markers = learner.objective.tokenizer.markers

    def nats(prompt, answer):
        with torch.no_grad():
            read = seq2seq.encoded(learner, [prompt])
            return seq2seq.surprise(learner, markers.assistant, *read, [answer])

    prompt, answer = [*b"what is"], [*b"it"]
    for i in range(len(prompt)):
        other = [*prompt]
        other[i] = 120
        assert abs(nats(other, answer) - nats(prompt, answer)) > 1e-4
    longer = nats(prompt, [*answer, 1]) - nats(prompt, answer)
    other = nats(prompt, [*answer, 2]) - nats(prompt, answer)
    assert longer > 0 and other > 0 and longer != other  # only the last term has changed


def test_answers_are_written_with_the_probability_that_the_loss_gives_them(made):
    learner = made[0]
    markers = learner.objective.tokenizer.markers
    prompts = [[*b"what is 1?"], [*b"and?"]]
    with torch.no_grad():
        read = seq2seq.encoded(learner, prompts)
        said = seq2seq.written(learner, markers, *read, 12)
        ids = [[*ids, markers.end][:12] for ids, _ in said]
        nats = seq2seq.surprise(learner, markers.assistant, *read, ids)
    assert -nats.numpy() == pytest.approx([ln_p for _, ln_p in said], rel=1e-4)


def test_with_exchange_an_answer_stands_behind_the_prompt_of_the_row_before(made):
    learner, t = made[0], made[0].objective.tokenizer
    rows = [Row("a", talk(*pair)["messages"][:-1], pair[1]) for pair in PAIRS[:3]]
    others = [row._replace(messages=rows[i - 1].messages) for i, row in enumerate(rows)]
    s = seq2seq.Settings(exchange=True, slots=2, max_tokens=1)
    exchanged = seq2seq.ask(learner, t, rows, s).exchanged
    s.exchange = False
    plain = seq2seq.ask(learner, t, others, s)
    assert exchanged == pytest.approx(plain.nats, rel=1e-5) and plain.exchanged == []


def test_it_keeps_the_promises_of_all(train, chat, made, capsys, tmp_path):
    promises.shared_out_alike(*made)
    run = promises.resumes(train, chat, *ARGV)
    promises.evaluates(run, capsys)
    promises.is_exported(run, tmp_path / "exported")
    seq2seq.main([str(run), "--limit=4", "--max_tokens=6", "--exchange=true"])
    out = capsys.readouterr().out
    assert "exact match" in out and "prompts exchanged" in out
    rows = [json.loads(line) for line in open(run / "answers.jsonl")]
    assert len(rows) == 8 and {row["task"] for row in rows} == {"a", "b"}
    assert all(row["reference"].startswith("it is") for row in rows)

    import evaluate
    import sample

    with pytest.raises(ValueError, match=r"python -m objectives\.encoder_decoder"):
        sample.main([str(run)])
    with pytest.raises(ValueError, match=r"python -m objectives\.encoder_decoder"):
        evaluate.main([str(run), f"--label={chat / 'meta.json'}"])


def test_what_has_no_prompt_is_refused(data, chat):
    with pytest.raises(ValueError, match="learns from rows"):
        promises.make(data, *ARGV)
    with pytest.raises(ValueError, match="train_on='all' should be answers"):
        promises.make(chat, *ARGV, "--train_on=all")
    with pytest.raises(ValueError, match="canon=4 should be 0"):
        promises.make(chat, *ARGV, "--canon=4")
