"""Requests side by side in one model, and text that is told only once it is certain."""

import random
import threading
import time

import pytest
from servers import wait

from engine.batching import Engine, Full, Request, scored
from engine.inference import ready
from engine.transcript import Transcript
from engine.wordfilter import WordFilter
from generate import prefill
from model import GPT, GPTConfig
from tokenizer import bytes_tokenizer

# --- transcripts


def words_of(text: str, rng: random.Random) -> list[bytes]:
    raw, found = text.encode(), []
    while raw:
        n = rng.randint(1, 4)
        found.append(raw[:n])
        raw = raw[n:]
    return found


class Pieces:
    """A vocabulary of pieces of one text, cut anywhere, also inside characters."""

    ends = (0,)

    def __init__(self, pieces):
        self.pieces = [b"", *pieces]

    def decode_bytes(self, ids):
        return b"".join(self.pieces[i] for i in ids)

    def decode(self, ids):
        return self.decode_bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("seed", range(30))
def test_no_stop_or_listed_string_leaves_however_it_is_cut_and_nothing_else_is_lost(seed):
    rng = random.Random(seed)
    text = "".join(rng.choices(["ab", "a", "b", "文", "é", "🙂", " ", "bad", "x."], k=40))
    stop = rng.choice(["aab", "文文", "bx", "🙂é", "none at all"])
    words = WordFilter(["bad", "文字"]) if seed % 2 else None
    tokenizer = Pieces(words_of(text, rng))
    transcript = Transcript(tokenizer, (stop,), words)
    shown, told = "", []
    for token in range(1, len(tokenizer.pieces)):
        new = transcript.feed(token, (token, -1.0, [(1, -2.0)]))
        shown, told = shown + new.text, told + new.ids
        assert [i for i, _, _ in new.scores] == new.ids
        assert stop not in shown and not (words and words.find(shown))
        # no token is told before all of its characters are shown
        assert len(tokenizer.decode_bytes(told)) <= len(shown.encode())
        if transcript.finish:
            break
    rest = transcript.end()
    shown, told = shown + rest.text, told + rest.ids
    ends = [text.find(stop)] if stop in text else []
    ends += [found[0] for found in (words.find(text)[:1] if words else [])]
    assert shown == text[: min(ends, default=len(text))]
    if not ends:
        assert told == [*range(1, len(tokenizer.pieces))]


@pytest.mark.parametrize("mode", ["stop", "mask"])
def test_neither_ids_nor_scores_tell_of_a_listed_word(mode):
    words = WordFilter(["bad"])
    transcript = Transcript(Pieces([b" ", b"b", b"a", b"d"]), words=words, action=mode)
    pieces = [transcript.feed(i, (i, -1.0, [(4, -1.0)])) for i in (1, 2, 3, 4)]
    pieces.append(transcript.end())
    assert [i for piece in pieces for i in piece.ids] == [1]
    assert [i for piece in pieces for i, *_ in piece.scores] == [1]


# --- side by side


def make_model(**options) -> GPT:
    shape = dict(vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=32, zero_init=False)
    model = GPT(GPTConfig(**shape | options))
    model.init_weights(0)
    for p in model.parameters():
        p.data.mul_(3)  # logits that differ
    return model.eval()


def request_of(engine: Engine, tell, prompt=(1,), n=1, most=30, seed=0, **more) -> Request:
    how = dict(options={}, transcript=lambda: Transcript(engine.tokenizer), tell=tell) | more
    return Request([*prompt], n, most, seed, **how)


def asked_of(engine: Engine, prompts, most=12, together=True):
    """The (texts, scores) of each prompt, from an engine whose steps are made here."""
    found = [dict(ids=[], scores=[]) for _ in prompts]

    def tell(i):
        def told(piece):
            assert not isinstance(piece, Exception), piece
            found[i]["ids"] += piece.ids
            found[i]["scores"] += piece.scores

        return told

    for i, prompt in enumerate(prompts):
        engine.submit([request_of(engine, tell(i), prompt, most=most, seed=i, top_logprobs=257)])
        for _ in range(0 if not together else i % 3):
            engine.step()  # others are in the middle of their answers
        while not together and (engine.waiting or engine.number_running()):
            engine.step()
    while engine.waiting or engine.number_running():
        engine.step()
    return found


PROMPTS = [[i + 1] * n for i, n in enumerate((3, 40, 1, 17, 8, 30, 2, 5, 9, 21))]


@pytest.mark.parametrize("fast", [True, False])
def test_beside_neighbours_logits_are_those_alone(fast):
    model = make_model()
    model = ready(model, rows=4) if fast else model
    engine = Engine(model, bytes_tokenizer(), 4, 64, chunk=16, exact=not fast)
    beside = asked_of(engine, PROMPTS)
    alone = asked_of(engine, PROMPTS, together=False)
    for one, other in zip(beside, alone, strict=True):
        assert one["ids"] == other["ids"] and len(one["ids"]) > 0
        for (_, p, best), (_, q, rest) in zip(one["scores"], other["scores"], strict=True):
            assert p == pytest.approx(q, abs=1e-4)
            assert dict(best) == (pytest.approx(dict(rest), abs=1e-4) if fast else dict(rest))


def test_a_prompt_read_in_pieces_gives_the_logits_of_one_read_whole():
    model, prompt = make_model(), [*range(1, 50)]
    engine = Engine(model, bytes_tokenizer(), 2, 8, chunk=7)
    [found] = asked_of(engine, [prompt], most=1)
    logits = prefill(model, [prompt], model.new_cache(1))
    best = dict(scored(logits, [0], 257)[0][2])
    assert dict(found["scores"][0][2]) == pytest.approx(best, abs=1e-4)


def test_a_long_prompt_does_not_hold_up_the_others():
    model = make_model()
    engine = Engine(model, bytes_tokenizer(), 2, 8, chunk=8)
    short, long = [], []
    engine.submit([request_of(engine, short.append, most=20)])
    engine.step()
    engine.submit([request_of(engine, long.append, [2] * 60, most=4)])
    for _ in range(8):
        assert not long
        engine.step()
    assert long and len(short) == 9  # a token between any two pieces of the long prompt


def test_a_late_comer_joins_and_a_full_line_is_said():
    engine = Engine(make_model(), bytes_tokenizer(), 2, 3, chunk=8)
    told = []
    engine.submit([request_of(engine, told.append, n=2)])
    engine.submit([request_of(engine, told.append)])
    with pytest.raises(Full):
        engine.submit([request_of(engine, told.append)])
    engine.step()
    assert engine.number_running() == 2 and engine.number_waiting() == 1
    engine.submit([request_of(engine, told.append, n=2)])
    assert engine.used() == pytest.approx(2 * 2 / 128)


def test_whoever_is_gone_or_late_leaves_within_two_tokens_and_a_failure_ends_no_server():
    engine = Engine(make_model(), bytes_tokenizer(), 2, 8, chunk=8)
    told = []

    def make(**more):
        return request_of(engine, told.append, [1] * 30, **more)

    running, reading, waiting, late = make(), make(), make(), make(deadline=time.monotonic() + 60)
    engine.submit([running])
    for _ in range(6):
        engine.step()
    engine.submit([reading, waiting, late])
    engine.step()
    running.gone = reading.gone = waiting.gone = True
    late.deadline = time.monotonic()
    said = len(told)
    engine.step()
    assert not engine.slots.writing and not engine.waiting and engine.prefill is None
    assert [type(piece) for piece in told[said:]] == [TimeoutError]
    engine.submit([make()])
    for _ in range(5):
        engine.step()
    engine.fail(ValueError("not finite"))
    assert isinstance(told[-1], ValueError) and engine.slots.free() == 2


@pytest.mark.parametrize("place", ["new_cache", "place"])
def test_no_request_is_lost_when_a_step_fails(place, monkeypatch):
    engine = Engine(make_model(), bytes_tokenizer(), 2, 8, chunk=8)
    told = []

    def full(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.model if place == "new_cache" else engine.slots, place, full)
        engine.submit([request_of(engine, told.append)])
        thread = threading.Thread(target=engine.run)
        thread.start()
        wait(lambda: told)
        assert isinstance(told[0], RuntimeError) and not engine.number_running()
    engine.submit([request_of(engine, told.append, most=2)])
    wait(lambda: told[-1] is not told[0] and told[-1].finish)
    engine.stop()
    thread.join(5)
    assert not thread.is_alive()


def test_the_end_of_a_text_has_a_log_probability_behind_an_echo():
    """lm-eval leaves the last of `token_logprobs` out, which it did not ask for."""
    pieces = Pieces([b"a", b"b"])
    transcript = Transcript(pieces, with_end=True)
    assert transcript.feed(1, (1, -1.0, [])).scores == [(1, -1.0, [])]
    last = transcript.feed(0, (0, -2.0, []))
    assert last.scores == [(0, -2.0, [])] and last.ids == [] and transcript.finish == "stop"
    plain = Transcript(pieces)
    plain.feed(1, (1, -1.0, []))
    assert plain.feed(0, (0, -2.0, [])).scores == []
