"""What a server answers: to OpenAI's own client, about itself, and never a listed word."""

import math
import re

import forked
import numpy as np
import pytest
import servers
import torch
from servers import serving, web

from engine.checkpoint import load_model
from engine.wordfilter import WordFilter
from model import Attention

run, talker, served, chat = servers.run, servers.talker, servers.served, servers.chat
openai = servers.openai  # without it, to import servers skips this file


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


# --- what is counted, filtered, and shown


def test_metrics_are_what_was_counted_and_no_answer_is_longer_than_the_server_allows(run):
    with serving(run, name="tiny", max_tokens=7) as running:
        asked = dict(model="tiny", prompt="abc", temperature=0)  # drawn, it might end sooner
        client = running.client()
        tokens = [client.completions.create(**asked, max_tokens=n).usage for n in (1, 5, 9)]
        text = web.get(running.url + "/metrics").text

        def value(name):
            [line] = [line for line in text.splitlines() if line.startswith(name)]
            return float(line.split()[-1])

        written = [usage.completion_tokens for usage in tokens]
        assert written == [1, 5, 7]
        assert value("vllm:generation_tokens_total") == sum(written)
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
    facts = web.get(served.url + "/inspect/run").json()
    assert facts["layers"] == 2 and not facts["chat"] and len(facts["losses"]) > 3
    assert any(row[2] for row in facts["losses"]) and any(row[1] for row in facts["losses"])
    assert web.get(chat.url + "/inspect/run").json()["models"] == ["chat", "chat:echo"]
    assert served.post("/inspect/attention", dict(prompt="a", layer=9)).status_code == 400
    page = web.get(served.url + "/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
