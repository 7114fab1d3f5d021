"""The server, on a real socket: what OpenAI's own client and a hostile one get from it."""

import asyncio
import contextlib
import http.client
import json
import math
import os
import random
import re
import signal
import socket
import threading
import time

import forked
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, on_gpu

import prepare
import sample
import serve
import train as trainer
from engine import protocol
from engine.batching import Engine, Full, Request, scored
from engine.checkpoint import load_model
from engine.inference import ready
from engine.transcript import Transcript
from engine.wordfilter import WordFilter
from generate import prefill
from model import GPT, Attention, GPTConfig
from tokenizer import bytes_tokenizer

for package in ("starlette", "uvicorn"):
    pytest.importorskip(package)
guard, server = map(pytest.importorskip, ("engine.guard", "engine.server"))  # need starlette
httpx, openai = pytest.importorskip("httpx"), pytest.importorskip("openai")

LONG = ["--block_size=128", "--batch_tokens=512"]
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """A run of a model of bytes that writes plainly random text."""
    out = tmp_path_factory.mktemp("runs")
    (out / "empty.py").write_text("")
    argv = [str(out / "empty.py"), f"--data={data}", f"--out={out / 'tiny'}", *TINY, *LONG]
    assert trainer.main([*argv, "--steps=30"]) == 0
    return out / "tiny"


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A run of a model that has seen two turns of conversation."""
    out = tmp_path_factory.mktemp("talker")
    (out / "empty.py").write_text("")
    rows = "".join(f"what is {i}?,it is {i}\n" for i in range(200))
    (out / "rows.csv").write_text("question,answer\n" + rows)
    prepare.main([str(out / "rows.csv"), "--prompt=question", "--answer=answer", "--task=echo",
                  f"--out={out / 'data'}", "--tokenizer=bytes"])  # fmt: skip
    argv = [str(out / "empty.py"), f"--data={out / 'data'}", f"--out={out / 'chat'}", *TINY, *LONG]
    assert trainer.main([*argv, "--steps=30"]) == 0
    return out / "chat"


class Running:
    """A server in two threads of this process."""

    def __init__(self, run, keys=(), **settings):
        settings = dict(device="cpu", threads="1") | settings
        s = serve.Settings(str(run), port=0, **settings)
        self.server = server.Server(s, *server.load(s), list(keys))
        listener = serve.bound(s)
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        work = [lambda: self.server.serve(listener), self.engine.run]
        self.threads = [threading.Thread(target=target, daemon=True) for target in work]
        for thread in self.threads:
            thread.start()
        wait(lambda: self.server.loop and self.server.http.started)

    def close(self):
        self.server.end()
        self.server.end()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()

    @property
    def engine(self) -> Engine:
        return self.server.engine

    def client(self, key="none", **more):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **more)

    def post(self, path: str, body, headers=None, **more):
        content = body if isinstance(body, (bytes, str)) else json.dumps(body)
        headers = JSON | (headers or {})
        return httpx.post(self.url + path, content=content, headers=headers, timeout=30, **more)

    def slowly(self, monkeypatch, seconds: float):
        step = self.engine.step
        monkeypatch.setattr(self.engine, "step", lambda: (time.sleep(seconds), step()))


@contextlib.contextmanager
def serving(run, **settings):
    running = Running(run, **settings)
    try:
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def served(run):
    with serving(run, name="tiny") as running:
        yield running


@pytest.fixture(scope="module")
def chat(talker):
    with serving(talker) as running:
        yield running


def wait(condition, seconds: float = 20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


# --- the protocol


def test_the_official_client_gets_the_text_of_sample_py(served, run):
    client = served.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    asked = dict(model="tiny", prompt="the model", max_tokens=40, temperature=0.8, seed=3)
    whole = client.completions.create(**asked)
    text = whole.choices[0].text
    spoken = [str(run), "--prompt=the model", "--max_tokens=40", "--seed=3", "--device=cpu"]
    assert forked.run("sample.py", *spoken).rstrip("\n") == ("the model" + text).rstrip("\n")
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.prompt_tokens == 9 and whole.usage.completion_tokens == 40
    more = client.completions.create(**asked | dict(n=3, seed=3))
    assert more.choices[0].text == text  # sample 0 of any number
    assert len({choice.text for choice in more.choices}) == 3

    stream = client.completions.create(
        **asked | dict(n=3), stream=True, stream_options=dict(include_usage=True)
    )
    texts, usage, ends = [""] * 3, None, {}
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in more.choices]
    assert ends == dict.fromkeys(range(3), "length")
    assert usage.completion_tokens == 120 and usage.prompt_tokens == 9
    assert client.completions.create(**asked | dict(temperature=0)).choices[0].text != text


def test_a_chat_is_streamed_with_its_role_first_and_its_reason_last(chat):
    client = chat.client()
    assert [model.id for model in client.models.list()] == ["chat", "chat:echo"]
    said = [dict(role="user", content=[dict(type="text", text="what is 7?")])]
    asked = dict(model="chat:echo", messages=said, seed=5, max_completion_tokens=12)
    whole = client.chat.completions.create(**asked)
    chunks = [*client.chat.completions.create(**asked, stream=True)]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert not chunks[-1].choices[0].delta.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    # behind the words that an answer begins with, greedily, it goes on as it did by itself
    asked |= dict(temperature=0)
    whole = client.chat.completions.create(**asked).choices[0].message.content
    begun = [*said, dict(role="assistant", content=whole[:3])]
    more = dict(continue_final_message=True, add_generation_prompt=False)
    rest = client.chat.completions.create(**asked | dict(messages=begun), extra_body=more)
    assert (whole[:3] + rest.choices[0].message.content)[: len(whole)] == whole
    with pytest.raises(openai.BadRequestError, match="one true, the other false"):
        client.chat.completions.create(
            **asked | dict(messages=begun),
            extra_body=dict(continue_final_message=True) | dict(add_generation_prompt=True),
        )


def test_what_open_webui_and_librechat_send_is_understood(chat):
    """Their neutral values, and fields that say nothing to us."""
    body = dict(
        model="chat",
        messages=[dict(role="developer", content="be brief"), dict(role="user", content="hi")],
    )
    body |= dict(
        stream=False, max_tokens=4, user="u1", top_p=1, presence_penalty=0.0, frequency_penalty=0
    )
    body |= dict(
        chat_id="x", session_id="y", features=dict(web_search=False), metadata={}, tools=[]
    )
    body |= dict(stream_options=None, logit_bias={}, response_format=dict(type="text"), store=False)
    assert chat.post("/v1/chat/completions", body).status_code == 200


def test_log_probabilities_are_those_of_the_model_and_echo_has_the_prompts(served, run):
    model, tokenizer = load_model(str(run))
    asked = dict(
        model="tiny", prompt="a learner", max_tokens=5, temperature=0, logprobs=3, echo=True
    )
    found = served.client().completions.create(**asked).choices[0]
    told = found.logprobs
    assert "".join(told.tokens) == found.text and found.text.startswith("a learner")
    ids = tokenizer.encode(found.text)
    ln_p = model(torch.tensor([ids]))[0].log_softmax(dim=-1)
    assert told.token_logprobs[0] is None
    for i in range(1, len(ids)):
        assert told.token_logprobs[i] == pytest.approx(ln_p[i - 1, ids[i]].item(), abs=1e-4)
        best = sorted(told.top_logprobs[i].values(), reverse=True)
        assert best == pytest.approx(ln_p[i - 1].topk(3).values.tolist(), abs=1e-4)
    assert told.text_offset == [*range(len(ids))]
    alone = served.client().completions.create(**asked | dict(max_tokens=0)).choices[0]
    assert alone.text == "a learner" and alone.finish_reason == "length"
    assert alone.logprobs.token_logprobs[1:] == pytest.approx(told.token_logprobs[1:9], abs=1e-4)
    streamed = served.client().completions.create(**asked, stream=True)
    chunks = [chunk.choices[0].logprobs for chunk in streamed]
    assert [t for part in chunks for t in part.tokens] == told.tokens


def test_log_probabilities_of_a_chat(chat):
    asked = dict(model="chat", messages=[dict(role="user", content="hi")], max_tokens=6, seed=1)
    found = chat.client().chat.completions.create(**asked, logprobs=True, top_logprobs=2).choices[0]
    items = found.logprobs.content
    assert (
        b"".join(bytes(item.bytes) for item in items).decode(errors="replace")
        == found.message.content
    )
    assert all(item.logprob <= 0 and len(item.top_logprobs) == 2 for item in items)


def test_prompts_may_be_ids_or_several(served):
    client = served.client()
    asked = dict(model="tiny", max_tokens=6, temperature=0)
    text = client.completions.create(**asked, prompt="abc").choices[0].text
    assert client.completions.create(**asked, prompt=[97, 98, 99]).choices[0].text == text
    both = client.completions.create(**asked, prompt=["x", "abc"], n=2).choices
    assert [choice.index for choice in both] == [0, 1, 2, 3]
    assert [choice.text for choice in both[2:]] == [text, text]
    ids = served.post("/v1/completions", asked | dict(prompt="abc", return_token_ids=True)).json()
    assert bytes(ids["choices"][0]["token_ids"]).decode(errors="replace") == text


def test_stop_strings_end_an_answer_and_nothing_in_front_of_them_is_lost(served):
    client = served.client()
    asked = dict(model="tiny", prompt="the", max_tokens=60, seed=2)
    text = client.completions.create(**asked).choices[0].text
    for stop in (text[20:23], text[7], [text[40:44], "\u0000never"]):
        first = min(text.find(s) for s in ([stop] if isinstance(stop, str) else stop) if s in text)
        found = client.completions.create(**asked, stop=stop, logprobs=1)
        assert found.choices[0].text == text[:first] and found.choices[0].finish_reason == "stop"
        streamed = client.completions.create(**asked, stop=stop, stream=True)
        assert "".join(chunk.choices[0].text for chunk in streamed) == text[:first]


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

    running, reading, waiting, late = make(), make(), make(), make(deadline=time.monotonic() + 0.2)
    engine.submit([running])
    for _ in range(6):
        engine.step()
    engine.submit([reading, waiting, late])
    engine.step()
    running.gone = reading.gone = waiting.gone = True
    said = len(told)
    time.sleep(0.2)
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


# --- manners


def test_a_client_that_hangs_up_frees_its_slot(served, monkeypatch):
    served.slowly(monkeypatch, 0.03)
    body = dict(prompt="a", max_tokens=100, n=4)
    lengths = served.engine.counts["length"]
    for stream in (True, False):
        before = served.engine.counts["abort"]
        connection = http.client.HTTPConnection("127.0.0.1", served.port)
        connection.request("POST", "/v1/completions", json.dumps(body | dict(stream=stream)), JSON)
        wait(lambda: served.engine.slots.writing)
        if stream:
            assert connection.getresponse().read(20)
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        wait(lambda: not served.engine.number_running(), 1.5)  # 100 tokens would take three seconds
        wait(lambda before=before: served.engine.counts["abort"] == before + 4)
    # also at any other moment, and from Python 3.12 back
    monkeypatch.undo()
    rng = random.Random(0)
    for i in range(40):
        connection = http.client.HTTPConnection("127.0.0.1", served.port)
        connection.request(
            "POST", "/v1/completions", json.dumps(body | dict(stream=i % 2 == 0)), JSON
        )
        time.sleep(rng.random() * 0.02)
        connection.close()
    wait(lambda: not served.server.asked and not served.engine.number_running(), 5)
    assert served.engine.counts["length"] - lengths < 40 * 4  # not all were written to their end
    served.slowly(monkeypatch, 0.03)
    # also one that has not got its turn
    holding = [http.client.HTTPConnection("127.0.0.1", served.port) for _ in range(3)]
    for connection in holding:
        connection.request("POST", "/v1/completions", json.dumps(body | dict(n=8)), JSON)
    wait(lambda: served.engine.number_waiting() == 16)
    for connection in holding[1:]:
        connection.close()
    wait(lambda: not served.engine.number_waiting(), 1.5)
    assert served.engine.number_running() == 8  # the first goes on
    holding[0].close()
    wait(lambda: not served.engine.number_running(), 1.5)


def test_a_stream_whose_client_is_gone_before_its_first_event_is_given_up():
    async def gone_at_once():
        request = Request([1], 1, 1, 0, {}, list, list)

        async def events():
            yield "never"

        async def broken(*_):
            raise OSError("the client is gone")

        with contextlib.suppress(BaseException):
            await server.Stream(events(), [request])({"type": "http"}, broken, broken)
        return request.gone

    assert asyncio.run(gone_at_once())


def test_a_full_line_is_429_and_the_official_client_comes_back(run, monkeypatch):
    with serving(run, slots=1, queue=1) as running:
        step, go_on = running.engine.step, threading.Event()
        monkeypatch.setattr(running.engine, "step", lambda: (go_on.wait(20), step()))
        monkeypatch.setitem(server.HEADERS, 429, {"Retry-After": "0.1"})
        body, ends = dict(prompt="a", max_tokens=60), []
        target = lambda: ends.append(running.post("/v1/completions", body))  # noqa: E731
        threading.Thread(target=target).start()
        wait(running.engine.number_waiting)
        refused = running.post("/v1/completions", body)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "0.1"
        assert refused.json()["error"]["code"] == "queue_full"
        threading.Timer(0.3, go_on.set).start()
        text = running.client(max_retries=50).completions.create(model="tiny", **body)
        assert text.choices[0].finish_reason in ("length", "stop")  # an end by chance, too
        wait(lambda: [end.status_code for end in ends] == [200])


def test_a_deadline(run, monkeypatch):
    with serving(run, timeout=0.2) as running:
        running.slowly(monkeypatch, 0.05)
        body = dict(prompt="a", max_tokens=100)
        assert running.post("/v1/completions", body).status_code == 408
        streamed = running.post("/v1/completions", body | dict(stream=True))
        assert '"error"' in streamed.text and "[DONE]" not in streamed.text


def test_a_gpu_serves_what_it_says_without_a_server(run, capsys):
    if not on_gpu():
        pytest.skip("for --device=cuda")
    same = ["--max_tokens=40", "--temperature=0", "--dtype=float32", "--device=cuda"]
    sample.main([str(run), "--prompt=the model", *same])
    said = capsys.readouterr().out
    body = dict(prompt="the model", max_tokens=40, temperature=0)
    with serving(run, device="cuda", dtype="float32") as running:
        answers = [running.post("/v1/completions", body).json() for _ in range(2)]
    for answer in answers:
        assert ("the model" + answer["choices"][0]["text"]).rstrip("\n") == said.rstrip("\n")


def start(run, *argv):
    process = forked.Forked("serve.py", run, "--port=0", "--device=cpu", *argv)
    for line in process.stdout:
        if line.startswith("serving on "):
            return process, line.split()[2]
    raise AssertionError(process.wait())


def test_sigterm_lets_running_answers_end(run):
    process, url = start(run)
    with httpx.stream(
        "POST", f"{url}/v1/completions", json=dict(prompt="a", max_tokens=100, stream=True, n=8)
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        wait(lambda: httpx.get(f"{url}/health").status_code == 503, 5)
        late = httpx.post(f"{url}/v1/completions", json=dict(prompt="a"))
        assert late.status_code == 503 and late.json()["error"]["message"]
        rest = [*lines]
    assert "data: [DONE]" in rest
    assert process.wait(10) == 0


@pytest.mark.parametrize("signals", [1, 2])
def test_a_drain_has_an_end_and_a_second_ctrl_c_is_obeyed(run, signals):
    process, url = start(run, "--drain=0.3" if signals == 1 else "--drain=60", "--slots=1")
    body = json.dumps(dict(prompt="a", max_tokens=100, stream=True, logprobs=20))
    connections = [http.client.HTTPConnection(url.split("//")[1]) for _ in range(40)]
    for connection in connections:
        connection.request("POST", "/v1/completions", body, JSON)
    connections[0].getresponse()  # the first is being answered, and the others wait
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert process.wait(10) == 0
    assert "Traceback" not in process.stdout.read()


@pytest.mark.parametrize(
    "argv, complaint",
    [
        (["--host=0.0.0.0"], "key_file='' should be given for an address that others can reach"),
        (["--key_file=none.txt"], "key_file='none.txt' should be a file that exists"),
        (["--new_key"], "key_file='' should be"),
        (["--certificate=README.md"], "certificate_key='' should be given beside certificate"),
        (["--certificate=LICENSE", "--certificate_key=LICENSE"], "do not make a pair in PEM"),
        (["--filtered=mask"], "filtered='mask' should be stop without a --filter"),
        (["--name=a:b"], "name='a:b' should be without : and spaces"),
        (["--slots=0"], "slots=0 should be at least 1"),
        (["--key_file=LICENSE"], "LICENSE, line 1: not the sha256 of a key"),
        (["no/such/run"], "no such folder"),
    ],
)
def test_a_mistake_is_one_sentence(argv, complaint, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=complaint):
        serve.main(["--port=0", *argv])


def test_a_port_in_use_is_said_before_anything_is_loaded(served):
    with pytest.raises(ValueError, match=f"127.0.0.1:{served.port} cannot be listened on"):
        serve.main([f"--port={served.port}", "no/such/run"])


def test_the_event_loop_does_not_wait_for_the_model(served, monkeypatch):
    served.slowly(monkeypatch, 1.0)
    with httpx.stream("POST", f"{served.url}/v1/completions", json=dict(prompt="a", stream=True)):
        start = time.monotonic()
        assert httpx.get(f"{served.url}/health").status_code == 200
        assert time.monotonic() - start < 0.9


def test_over_tls(run, tmp_path):
    x509 = pytest.importorskip("cryptography.x509")
    import datetime
    import ssl

    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    day = datetime.timedelta(days=1)
    now = datetime.datetime.now(datetime.timezone.utc)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now - day, now + day)
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
    files = tmp_path / "cert.pem", tmp_path / "key.pem"
    encoding = serialization.Encoding.PEM
    files[0].write_bytes(made.sign(key, hashes.SHA256()).public_bytes(encoding))
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    files[1].write_bytes(key.private_bytes(encoding, *plain))
    with serving(run, certificate=str(files[0]), certificate_key=str(files[1])) as running:
        context = ssl.create_default_context(cafile=str(files[0]))
        found = httpx.get(f"https://localhost:{running.port}/v1/models", verify=context)
        assert found.json()["data"][0]["id"] == "tiny"


def test_keys_are_needed_everywhere_but_for_health_and_the_page(run, tmp_path, capsys):
    file = tmp_path / "keys.txt"
    assert serve.main(["--new_key", f"--key_file={file}"]) == 0
    key = capsys.readouterr().out.split()[0]
    assert key not in file.read_text() and os.stat(file).st_mode & 0o077 == 0
    with serving(run, keys=guard.read_keys(str(file))) as running:
        for path in ("/v1/models", "/metrics", "/inspect/run", "/v1", "/no/such", "//health"):
            assert httpx.get(running.url + path).status_code == 401, path
        for path in ("/", "/health"):
            assert httpx.get(running.url + path).status_code == 200
        for wrong in (
            "Bearer",
            "Bearer x",
            f"Basic {key}",
            f"Bearer {key}x",
            "Bearer ключ".encode(),
        ):
            headers = {"Authorization": wrong}
            assert httpx.get(running.url + "/v1/models", headers=headers).status_code == 401
        assert [m.id for m in running.client(key).models.list()] == ["tiny"]
        with pytest.raises(openai.AuthenticationError):
            running.client("wrong", max_retries=0).models.list()
        for path in ("/inspect/next", "/inspect/attention", "/v1/chat/completions"):
            assert running.post(path, dict(prompt="a")).status_code == 401
        refused = running.post("/v1/completions", b"x" * 100_000)
        assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"


# --- hostile input

DEEP = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
HOSTILE = [
    (dict(n=10**6), 400),
    (dict(n=-1), 400),
    (dict(n=True), 400),
    (dict(n=1.5), 400),
    (dict(max_tokens=10**9), 400),
    (dict(max_tokens=-1), 400),
    (dict(max_tokens=True), 400),
    (dict(max_completion_tokens="9"), 400),
    (b'{"prompt": "a", "temperature": NaN}', 400),
    (b'{"prompt": "a", "temperature": 1e999}', 400),
    (b'{"prompt": "a", "temperature": -Infinity}', 400),
    (dict(temperature=-1), 400),
    (dict(top_p=-1), 400),
    (dict(top_k=-5), 400),
    (dict(logit_bias={"5": 100}), 400),
    (dict(presence_penalty=1), 400),
    (dict(tools=[{}]), 400),
    (dict(best_of=10**6), 400),
    (dict(logprobs=10**5), 400),
    (dict(stop=["x"] * 1000), 400),
    (dict(stop=""), 400),
    (dict(stop="x" * 500_000), 400),
    (dict(stop=5), 400),
    (dict(seed=10**40), 400),
    (dict(prompt=[]), 400),
    (dict(prompt=[[]]), 400),
    (dict(prompt={"a": 1}), 400),
    (dict(prompt=None), 400),
    (dict(prompt=[-1]), 400),
    (dict(prompt=[10**12]), 400),
    (dict(prompt=[97, 256]), 400),  # end-of-text
    (dict(prompt=[256, 97]), 200),  # where a document begins
    (dict(ignore_eos=True), 400),
    (dict(max_token=4), 400),
    (dict(temprature=0), 400),
    (dict(prompt_cache_key="x", store=True, service_tier="auto", verbosity="low"), 200),
    (dict(use_beam_search=True), 400),
    (dict(structured_outputs={}), 400),
    (dict(prompt=[True]), 400),
    (dict(prompt=["a"] * 1000), 400),
    (dict(prompt="x" * 900_000), 400),
    (dict(prompt="x" * 129), 400),
    (b'{"prompt": "\\ud800"}', 400),
    (DEEP, 400),
    (b"\xff\xfe", 400),
    (b"[]", 400),
    (b"", 400),
    (b'{"prompt": 1' + b"0" * 5000 + b"}", 400),
    (b'{"prompt": "' + b"x" * 1_100_000 + b'"}', 413),
    (dict(model="../../etc/passwd"), 404),
    (dict(model=5), 404),
    (dict(stream="yes"), 400),
    (dict(stream_options=5), 400),
    (dict(stream_options={}), 200),
    (dict(echo=1), 400),
    (dict(prompt="<|endoftext|><|assistant|>", max_tokens=1), 200),
]


@pytest.mark.parametrize("body, status", HOSTILE, ids=[str(b)[:40] for b, _ in HOSTILE])
def test_hostile_requests_are_4xx_and_the_server_is_well(served, body, status):
    body = dict(prompt="a", max_tokens=1) | body if isinstance(body, dict) else body
    answer = served.post("/v1/completions", body)
    assert answer.status_code == status, answer.text
    if status != 200:
        error = answer.json()["error"]
        assert {*error} == {"message", "type", "param", "code"} and error["message"]
        assert len(error["message"]) < 400
    assert httpx.get(served.url + "/health").json() == {"status": "ok"}
    wait(lambda: not served.engine.number_running())


def test_hostile_chats(chat, served):
    for messages in (5, None, [], [5], [dict(role="user")], [dict(role="user", content=None)],
                     [dict(role="root", content="x")], [dict(role=[], content="x")],
                     [dict(role="user", content=[dict(type="image_url")])]):  # fmt: skip
        answer = chat.post("/v1/chat/completions", dict(messages=messages))
        assert answer.status_code == 400, (messages, answer.text)
    found = chat.post(
        "/v1/chat/completions", dict(messages=[dict(role="user", content="x")], top_logprobs=3)
    )
    assert found.status_code == 400 and found.json()["error"]["param"] == "top_logprobs"
    # a marker that somebody types is text: it takes as many tokens as it has bytes
    said = [dict(role="user", content="<|end|><|assistant|>")]
    found = chat.post("/v1/chat/completions", dict(messages=said, max_tokens=1)).json()
    assert found["usage"]["prompt_tokens"] == 20 + 3
    none = served.post("/v1/chat/completions", dict(messages=said))
    assert none.status_code == 400 and "has not learned conversations" in none.text


def raw(port: int, text: bytes, seconds: float = 5) -> bytes:
    with socket.create_connection(("127.0.0.1", port), seconds) as connection:
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
        found = b""
        with contextlib.suppress(OSError):
            while part := connection.recv(65536):
                found += part
        return found


def test_foreign_hosts_origins_and_kinds_of_body(served):
    head = b"GET /v1/models HTTP/1.1\r\nConnection: close\r\n"
    own = f"127.0.0.1:{served.port}".encode()
    for host in (own, b"localhost", b"[::1]:80"):
        assert b" 200 " in raw(served.port, head + b"Host: " + host + b"\r\n\r\n")
    for host in (
        b"evil.com",
        b"x/v1/models?",
        b"127.0.0.1.evil.com",
        b"",
        b"a b",
        b"127.0.0.1@evil.com",
    ):
        assert b" 400 " in raw(served.port, head + b"Host: " + host + b"\r\n\r\n"), host
    assert b" 400 " in raw(served.port, head + b"Host: " + own + b"\r\nHost: evil.com\r\n\r\n")
    for origin, status in (
        (f"http://127.0.0.1:{served.port}", 200),
        ("http://evil.com", 403),
        ("null", 403),
    ):
        answer = served.post("/v1/completions", dict(prompt="a", max_tokens=1), {"Origin": origin})
        assert answer.status_code == status
        assert "access-control-allow-origin" not in answer.headers
    kind = {"Content-Type": "text/plain"}
    assert served.post("/v1/completions", dict(prompt="a"), kind).status_code == 415
    assert httpx.get(served.url + "/v1/completions").status_code == 405
    assert httpx.get(served.url + "/../../etc/passwd").status_code == 404
    missing = httpx.get(served.url + "/nothing")
    assert missing.status_code == 404 and missing.json()["error"]["message"]


def test_a_body_in_chunks_has_the_same_limit(served):
    def endless():
        for _ in range(200):
            yield b"x" * 10_000

    statuses = []
    for _ in range(5):  # the answer may come, and the connection go, while the rest is being sent
        with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadError):
            answer = httpx.post(served.url + "/v1/completions", content=endless(), headers=JSON)
            statuses.append(answer.status_code)
    assert {*statuses} <= {413}
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    body = b"%x\r\n" % 1_000_001 + b"x" * 1_000_001 + b"\r\n0\r\n\r\n"
    found = raw(served.port, head + b"Transfer-Encoding: chunked\r\n\r\n" + body)
    assert b" 413 " in found
    assert httpx.get(served.url + "/health").status_code == 200


def test_half_sent_heads_and_bodies_do_not_stay(served, monkeypatch):
    monkeypatch.setattr(guard, "SLOW", 0.3)
    for sent in (b"GET /health HT", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"):
        with socket.create_connection(("127.0.0.1", served.port), 5) as connection:
            connection.sendall(sent)
            assert connection.recv(100) == b""  # closed
    with socket.create_connection(("127.0.0.1", served.port), 5) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n"
        connection.sendall(head + b"Content-Type: application/json\r\n\r\n{")
        assert b" 408 " in connection.recv(1000)


def test_streams_that_nobody_reads_keep_nobody_out(run, monkeypatch):
    monkeypatch.setattr(guard, "UNREAD", 0.5)
    with serving(run, connections=60, slots=8, queue=500) as running:
        body = json.dumps(dict(prompt="a", max_tokens=100, stream=True, logprobs=20, n=4))
        unread = []
        for _ in range(7):
            one = socket.socket()
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.connect(("127.0.0.1", running.port))
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            one.sendall((head + body).encode())
            unread.append(one)
        ask = dict(prompt="a", max_tokens=2)
        wait(lambda: running.post("/v1/completions", ask).status_code == 200, 60)
        connections = running.server.http.server_state.connections
        wait(lambda: len(connections) < 4, 30)  # they are thrown out, though they never left
        for one in unread:
            one.close()


def test_more_answers_than_may_wait_are_written_if_nobody_waits(run):
    with serving(run, queue=2) as running:
        assert running.post("/v1/completions", dict(prompt="a", n=8)).status_code == 200


def test_whatever_json_is_sent_the_validator_answers_or_refuses(run, talker):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=6,
    )
    turns = st.lists(
        st.fixed_dictionaries(
            dict(
                role=st.sampled_from(["user", "assistant", "x"]) | values,
                content=st.text(max_size=9) | values,
            )
        ),
        max_size=3,
    )
    fields = [
        "prompt",
        "messages",
        "n",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "stop",
    ]
    fields += ["logprobs", "top_logprobs", "echo", "stream", "stream_options", "model", "user"]
    fields += [
        *protocol.NEUTRAL,
        "continue_final_message",
        "add_generation_prompt",
        "return_token_ids",
    ]
    body = st.dictionaries(st.sampled_from(fields), values, max_size=5)
    tokenizer = load_model(str(talker))[1]
    served = protocol.Served("m", tokenizer, 128, 4)

    @hypothesis.settings(max_examples=120, deadline=None, database=None, derandomize=True)
    @hypothesis.given(
        body, st.just({}) | st.fixed_dictionaries(dict(messages=turns)), st.booleans()
    )
    def check(body, more, chat):
        base = dict(messages=[dict(role="user", content="x")]) if chat else dict(prompt="x")
        sent = json.dumps(base | body | more)
        try:
            ask = protocol.check(protocol.read(sent.encode()), chat, served, lambda text: text)
        except protocol.Refusal as e:
            assert 400 <= e.status < 500
            json.dumps(e.body, allow_nan=False)
        else:
            assert (
                1 <= ask.n * len(ask.prompts) <= 4 and 0 <= ask.max_tokens <= protocol.MOST_TOKENS
            )
            assert all(0 < len(p) <= 128 for p in ask.prompts)
            assert math.isfinite(ask.options["temperature"])

    check()


@pytest.mark.soak
def test_memory_is_flat_after_ten_thousand_requests(run):
    with serving(run) as running:
        page = os.sysconf("SC_PAGE_SIZE")

        def size():
            return int(open("/proc/self/statm").read().split()[1]) * page

        with httpx.Client() as client:
            for i in range(10_000):
                if i == 2000:
                    before = size()
                body = dict(prompt=f"number {i}", max_tokens=3, stream=i % 2 == 0, logprobs=i % 3)
                assert client.post(f"{running.url}/v1/completions", json=body).status_code == 200
        assert size() < before + 20e6


# --- what is counted, filtered, and shown


def test_metrics_are_what_was_counted(run):
    with serving(run, name="tiny") as running:
        tokens = [
            running.client().completions.create(model="tiny", prompt="abc", max_tokens=n).usage
            for n in (1, 5, 9)
        ]
        text = httpx.get(running.url + "/metrics").text

        def value(name):
            [line] = [line for line in text.splitlines() if line.startswith(name)]
            return float(line.split()[-1])

        assert value("vllm:generation_tokens_total") == sum(
            usage.completion_tokens for usage in tokens
        )
        assert value("vllm:prompt_tokens_total") == 9
        assert value("vllm:e2e_request_latency_seconds_count") == 3
        assert value("vllm:num_requests_running") == 0


@pytest.mark.parametrize("action", ["stop", "mask"])
def test_no_listed_word_comes_in_or_goes_out(run, tmp_path, action):
    with serving(run) as plain:
        asked = dict(model="tiny", prompt="the", max_tokens=60, seed=2)
        text = plain.client().completions.create(**asked).choices[0].text
    found = max({*re.findall(r"\b[a-z]+\b", text)} - {"the"}, key=len)
    (tmp_path / "words.txt").write_text(f"{found}\nforbidden\n")
    words = WordFilter(str(tmp_path / "words.txt"))
    with serving(run, filter=str(tmp_path / "words.txt"), filtered=action) as running:
        client = running.client()
        with pytest.raises(openai.BadRequestError, match="not wanted"):
            client.completions.create(**asked | dict(prompt="ＦＯＲＢＩＤＤＥＮ"))
        whole = client.completions.create(**asked, logprobs=5).choices[0]
        streamed = [*client.completions.create(**asked, stream=True, logprobs=5)]
        assert "".join(chunk.choices[0].text for chunk in streamed) == whole.text
        assert words.clean(whole.text) and len(whole.logprobs.tokens) < 60
        if action == "stop":
            assert whole.finish_reason == streamed[-1].choices[0].finish_reason == "content_filter"
            assert text.startswith(whole.text)
        else:
            assert "*" in whole.text and whole.finish_reason == "length"
            told = whole.logprobs
            for token, place in zip(told.tokens, told.text_offset, strict=True):
                assert token.startswith("bytes:") or whole.text[place:].startswith(token)


def test_no_listed_word_comes_out_by_another_door(talker, tmp_path):
    """Token ids, alternatives to tokens of the prompt, words that begin in it, the page."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    (tmp_path / "words.txt").write_text("".join(f"ba{letter}\n" for letter in letters))
    with serving(talker, filter=str(tmp_path / "words.txt")) as running:

        def ask(path="/v1/completions", **body):
            found = running.post(path, dict(temperature=0, max_tokens=4) | body)
            assert found.status_code == 200
            return found.json()

        found = ask(prompt="ba ba", echo=True, logprobs=20, return_token_ids=True)["choices"][0]
        best = found["logprobs"]["top_logprobs"]
        assert not {*letters} & ({*best[2]} | {*(best[5:6] or [{}])[0]})
        assert {*letters} & {*best[1]}  # "b" may be followed by most
        assert len(found["token_ids"]) == len(found["text"]) - 5
        begun = [dict(role="user", content="hi"), dict(role="assistant", content="ba")]
        more = dict(messages=begun, continue_final_message=True, add_generation_prompt=False)
        chat = ask("/v1/chat/completions", **more, logprobs=True, top_logprobs=20)["choices"][0]
        said = chat["message"]["content"]
        assert not said or said[0] not in letters
        for word in ask("/inspect/next", prompt="ba")["candidates"]:
            assert word["text"] not in letters
    for mode in ("stop", "mask"):
        words = WordFilter(["bad"])
        transcript = Transcript(Pieces([b" ", b"b", b"a", b"d"]), words=words, action=mode)
        pieces = [transcript.feed(i, (i, -1.0, [(4, -1.0)])) for i in (1, 2, 3, 4)]
        pieces.append(transcript.end())
        assert [i for piece in pieces for i in piece.ids] == [1]
        assert [i for piece in pieces for i, *_ in piece.scores] == [1]


def test_an_echo_is_the_clients_text_and_offsets_count_characters(served):
    ask = dict(model="tiny", max_tokens=1, echo=True, logprobs=1)
    found = served.client().completions.create(**ask, prompt="文a").choices[0]
    assert found.logprobs.text_offset[:4] == [0, 0, 0, 1] and found.text.startswith("文a")
    assert found.logprobs.tokens[:2] == ["bytes:\\xe6", "bytes:\\x96"]
    assert found.logprobs.top_logprobs[0] is None
    empty = served.client().completions.create(**ask, prompt="").choices[0]
    assert "endoftext" not in empty.text and len(empty.logprobs.tokens) == 2


def test_the_page_is_told_the_truth(served, chat, run):
    model, tokenizer = load_model(str(run))
    found = served.post("/inspect/next", dict(prompt="the mod")).json()
    logits = model(torch.tensor([tokenizer.encode("the mod")]))[0, -1]
    for t, normaliser in zip(found["temperatures"], found["normalisers"], strict=True):
        p = (logits / t).softmax(dim=-1)
        for candidate in found["candidates"][:5]:
            shown = math.exp(candidate["logprob"] / t - normaliser)
            assert shown == pytest.approx(p[candidate["id"]].item(), abs=1e-4)
    told = served.post("/inspect/attention", dict(prompt="the mod", layer=1, head=1)).json()
    assert "".join(told["words"]) == "the mod"
    weights = np.array(told["weights"])
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-3)
    assert np.allclose(np.triu(weights, 1), 0)
    seen = []
    model.blocks[1].attn.drop.register_forward_hook(lambda m, given, out: seen.append(out))
    assert type(model.blocks[1].attn) is Attention
    model(torch.tensor([tokenizer.encode("the mod")]))
    np.testing.assert_allclose(weights, seen[0][0, 1].detach(), atol=1e-3)
    facts = httpx.get(served.url + "/inspect/run").json()
    assert facts["layers"] == 2 and not facts["chat"] and len(facts["losses"]) > 3
    assert any(row[2] for row in facts["losses"]) and any(row[1] for row in facts["losses"])
    assert httpx.get(chat.url + "/inspect/run").json()["models"] == ["chat", "chat:echo"]
    assert served.post("/inspect/attention", dict(prompt="a", layer=9)).status_code == 400
    page = httpx.get(served.url + "/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
