"""A conversation has the ids in transformers that it has here, whatever is said in it."""

import json
import random

import pytest
import torch
from promises import plain
from test_huggingface import KINDS, ours_of, tf

import huggingface
from engine import checkpoint, tokenizer_json
from engine.chat_template import GUARD
from engine.run import NEW
from generate import answers
from model import GPT, GPTConfig
from tokenizer import ROLES, Tokenizer, bytes_tokenizer

TASKS = ["translate", "sum-1"]
PIECES = [f"<|{name}|>" for name in ("end", "user", "assistant", "endoftext", "translate", "none")]
PIECES += ["<", "|", "<|", "end|>", GUARD, f"<{GUARD}", f"<{GUARD}|end|>", " ", "\n", "a b", "12"]
PIECES += ["文", "e\u0301", "\u0338", "<think>", "</think>", "<<", "<<SYS>>", "[INST]", "[", "</s>"]
PIECES += ["<|fim|>"]
ODD = ["<<SYS>>", "[INST]", "</s>", "<|fim|>", "<|endoftext|>"]


def odd() -> Tokenizer:
    """Special tokens of all sorts, and one that may stand in a text and begins like the others."""
    info = json.loads(KINDS["llama3"]().to_str())
    size = len(info["model"]["vocab"])
    info["added_tokens"] = [
        dict(id=size + i, content=text, special=text != "<|fim|>") for i, text in enumerate(ODD)
    ]
    return tokenizer_json.from_json(info, "odd", size + len(ODD))


def tokenizer_of(kind: str) -> Tokenizer:
    if kind == "odd":
        return odd()
    if kind == "qwen3":
        return tokenizer_json.from_json(json.loads(KINDS[kind]().to_str()), kind, 810)
    return ours_of(kind)


def make_model(tokenizer: Tokenizer, **settings) -> GPT:
    """A small model with random weights, whatever it writes."""
    model = GPT(GPTConfig(tokenizer.vocab_size, 64, n_layer=1, n_embd=32, **settings))
    source = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=source) * 0.3
    return model


def export(model: GPT, tokenizer: Tokenizer, folder, *argv: str):
    """Saves the model as a checkpoint, and returns the folder to which it is exported."""
    state = NEW | dict(step=1, settings={}, model=vars(model.config), data_digest=None, source="x")
    checkpoint.save(folder, 1, plain(model), {}, state, tokenizer)
    run = folder / checkpoint.name(1)
    huggingface.main(["export", str(run), str(folder / "out"), *argv])
    return folder / "out"


def conversations(count: int) -> list[list[dict]]:
    rng = random.Random(0)

    def said() -> str:
        return "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 12)))

    return [
        [dict(role=rng.choice(ROLES), content=said()) for _ in range(rng.randint(1, 4))]
        for _ in range(count)
    ]


@pytest.mark.parametrize("kind", ["bytes", "bpe", "qwen3", "odd"])
def test_a_conversation_has_the_same_ids_in_transformers(kind, tmp_path):
    ours = tokenizer_of(kind).extended(TASKS)
    theirs = tf.AutoTokenizer.from_pretrained(export(make_model(ours), ours, tmp_path))
    for i, messages in enumerate(conversations(300)):
        task = ["", *TASKS][i % 3]
        for go_on in (False, True):
            ids = theirs.apply_chat_template(
                messages, task=task, add_generation_prompt=go_on, return_dict=False
            )
            assert ids == ours.encode_row(messages, task, open=go_on)
        text = messages[0]["content"].replace(GUARD, "")
        assert theirs(text, split_special_tokens=True).input_ids == ours.encode(text)


def test_an_answer_ends_there_where_it_ends_here(tmp_path):
    tokenizer = tokenizer_of("bpe").extended([])
    model, end = make_model(tokenizer), tokenizer.markers.end

    def answer(said: str) -> list[int]:
        prompt = tokenizer.encode_row([dict(role="user", content=said)], open=True)
        ((_, ids),) = answers(model, tokenizer, [prompt], 24, temperature=0)
        return ids

    fourth = answer("hello")[3]  # becomes the end of a turn
    rows = model.head.weight.data
    rows[[fourth, end]] = rows[[end, fourth]]
    out = export(model, tokenizer, tmp_path)
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert sorted(ends) == sorted([tokenizer.end_of_text, end])
    pipe = tf.pipeline("text-generation", model=str(out), device="cpu")
    for said in ("hello", "a <|end|> b", "12"):
        (there,) = pipe([dict(role="user", content=said)], max_new_tokens=24, do_sample=False)
        assert there["generated_text"][-1]["content"] == tokenizer.decode(answer(said))
    assert len(answer("hello")) <= 3


@pytest.mark.parametrize("saved_there", [False, True])
def test_a_chat_model_comes_back_with_its_markers(saved_there, tmp_path):
    ours = tokenizer_of("bpe").extended(TASKS)
    out = export(make_model(ours), ours, tmp_path)
    if saved_there:
        theirs = tf.AutoTokenizer.from_pretrained(out)
        for name in ("encoding.json", "vocab.tiktoken"):
            (out / name).unlink()
        theirs.save_pretrained(out)
    huggingface.main(["import", str(out), str(tmp_path / "again")])
    again = Tokenizer.load(tmp_path / "again")
    assert again.markers == ours.markers and sorted(again.ends) == sorted(ours.ends)
    for i, messages in enumerate(conversations(100)):
        task = ["", *TASKS][i % 3]
        assert again.encode_row(messages, task) == ours.encode_row(messages, task)


@pytest.mark.parametrize(
    "message, task, sentence",
    [
        (dict(role="user", content="hello"), "translte", "unknown task translte: .* translate"),
        (dict(role="tool", content="hello"), "", "a message has text, and a role of user"),
        (dict(role="user", content=None), "", "a message has text"),
        (dict(role="user", content=[dict(type="text", text="hello")]), "", "a message has text"),
    ],
)
def test_what_no_row_has_is_refused_there_too(message, task, sentence, tmp_path):
    ours = bytes_tokenizer().extended(TASKS)
    theirs = tf.AutoTokenizer.from_pretrained(export(make_model(ours), ours, tmp_path))
    with pytest.raises(Exception, match=sentence):
        theirs.apply_chat_template([message], task=task)


def test_a_tokenizer_without_markers_has_no_template(tmp_path):
    ours = bytes_tokenizer()
    theirs = tf.AutoTokenizer.from_pretrained(export(make_model(ours), ours, tmp_path))
    assert theirs.chat_template is None
    assert theirs("<|end|>").input_ids == ours.encode("<|end|>")


def test_a_mask_that_no_class_there_has_is_exported_as_weights_alone(tmp_path, capsys):
    ours = bytes_tokenizer().extended([])
    model = make_model(ours, mask="prefix")
    with pytest.raises(ValueError, match="mask=prefix, and .* causal: .* --trunk_only"):
        export(model, ours, tmp_path)
    assert not (tmp_path / "out").exists()
    out = export(model, ours, tmp_path / "again", "--trunk_only")
    for told in (capsys.readouterr().out, (out / "README.md").read_text()):
        assert "trained with mask=prefix" in told
    theirs = tf.AutoModelForCausalLM.from_pretrained(out)
    tokens = torch.randint(256, (1, 20))
    with torch.no_grad():
        assert (model(tokens) - theirs(tokens).logits).abs().max() < 1e-4  # both are causal here


def test_who_exports_a_qwen2_that_talks_is_told_how_to_open_it(tmp_path, capsys):
    """AutoTokenizer gives it Qwen's own normaliser, which takes no guard away."""
    ours = tokenizer_of("bpe").extended([])
    plain = dict(norm_weight=True, embed_norm=False, qk_norm=False, logit_cap=0.0, mlp="swiglu")
    out = export(make_model(ours, **plain, qkv_bias=True), ours, tmp_path)
    assert "open it with PreTrainedTokenizerFast" in capsys.readouterr().err
    theirs = tf.PreTrainedTokenizerFast.from_pretrained(out)
    messages = [dict(role="user", content="<|end|>")]
    assert theirs.apply_chat_template(messages, return_dict=False) == ours.encode_row(messages)
