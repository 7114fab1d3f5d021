"""Hugging Face's layout: the same logits, bits, ids and text on both sides, and clear refusals.

transformers makes the models; nothing here needs a network.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter

import forked
import pytest
import regex
import torch
from conftest import make_text
from safetensors.torch import load_file, save_file

import huggingface
from bpe import bpe_tokenizer
from engine import families, tensors, tokenizer_json
from engine.checkpoint import load_model
from model import GPTConfig
from sample import generate
from tokenizer import SPLIT, Tokenizer, bytes_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
tf = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
cuts = tokenizers.pre_tokenizers

# --- texts and tokenizers

WORDS = ["<|endoftext|>", "<think>", "</think>", "def f(x):\n    return", " world", "1234567"]
WORDS += [
    "  \n\n\t ",
    "don't I'LL",
    "黛玉笑道：",
    "👩‍👩‍👧🇯🇵",
    "e\u0301\u0323",
    "か\u3099",
    "\u1100\u1161\u00a0",
    "\r\n",
]
LLAMA3 = (  # of meta-llama/Meta-Llama-3-8B
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CL100K = (  # of tiktoken: possessive, also behind an interval
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)


def hard_texts(count: int) -> list[str]:
    rng = random.Random(0)
    planes = [(9, 127), (9, 127), (0x80, 0x3FF), (0x4E00, 0x9FFF), (1, 0xD7FF), (0xE000, 0x10FFFF)]

    def piece() -> str:
        return rng.choice(WORDS) if rng.random() < 0.4 else chr(rng.randint(*rng.choice(planes)))

    return ["".join(piece() for _ in range(rng.randint(0, 24))) for _ in range(count)]


TEXTS = hard_texts(10_000)
CORPUS = [make_text(600), *TEXTS[:1000]]


def bpe(*words, normalizer=None, special=("<|endoftext|>",), vocab_size=800, **options):
    """A tokenizer that the library itself learns; the last of `words` is use_regex."""
    t = tokenizers.Tokenizer(tokenizers.models.BPE(**options))
    last = cuts.ByteLevel(add_prefix_space=False, use_regex=words[-1])
    t.pre_tokenizer = cuts.Sequence([*words[:-1], last]) if words[:-1] else last
    t.decoder = tokenizers.decoders.ByteLevel()
    if normalizer:
        t.normalizer = normalizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=cuts.ByteLevel.alphabet(),
        show_progress=False,
    )
    t.train_from_iterator(CORPUS, trainer)
    return t


def split(pattern: str):
    return cuts.Split(tokenizers.Regex(pattern), "isolated")


def qwen(**options):
    nfc = tokenizers.normalizers.NFC()
    return bpe(split(LLAMA3.replace("{1,3}", "")), False, normalizer=nfc, **options)


def qwen3():
    t = qwen(special=())
    flags = dict(normalized=False)
    t.add_tokens([tokenizers.AddedToken("<|endoftext|>", special=True, **flags)])
    t.add_tokens(
        [tokenizers.AddedToken(word, special=False, **flags) for word in ("<think>", "</think>")]
    )
    return t


KINDS = {
    "gpt2": lambda: bpe(True),
    "smollm": lambda: bpe(cuts.Digits(individual_digits=True), True),
    "digits": lambda: bpe(cuts.Digits(individual_digits=False), True),
    "llama3": lambda: bpe(split(LLAMA3), False, special=(), ignore_merges=True),
    "interval": lambda: bpe(split(LLAMA3.replace("1,3}", "1,3}+")), False),
    "qwen3": qwen3,
}


@pytest.mark.parametrize("kind", KINDS)
def test_imported_ids_are_those_of_the_tokenizers_library(kind):
    theirs = KINDS[kind]()
    size = theirs.get_vocab_size()
    ours = tokenizer_json.from_json(json.loads(theirs.to_str()), kind, size + 3, [])
    theirs.encode_special_tokens = True  # in a text, they are text here
    ids = [ours.encode(t) for t in TEXTS]
    assert ids == [found.ids for found in theirs.encode_batch_fast(TEXTS)]
    assert [*map(ours.decode, ids)] == theirs.decode_batch(ids, skip_special_tokens=False)
    assert ours.vocab_size == size + 3 and ours.decode([size + 2])  # ids without a token decode
    if "<|endoftext|>" in theirs.get_vocab():
        assert ours.end_of_text == theirs.token_to_id("<|endoftext|>")


def test_a_word_that_no_merge_makes_is_looked_up_whole():
    info = json.loads(KINDS["llama3"]().to_str())
    whole = info["model"]["vocab"]["qxzq"] = len(info["model"]["vocab"])
    theirs = tokenizers.Tokenizer.from_str(json.dumps(info))
    ours = tokenizer_json.from_json(info, "llama3", whole + 1, [])
    assert ours.encode("qxzq") == theirs.encode("qxzq").ids == [whole]
    for text in ("qxzq qxzq", "qxzqs", "a qxzq.qxzq", "qxzqxzq"):
        assert ours.encode(text) == theirs.encode(text).ids


def test_ids_in_another_order_than_the_merges_are_refused():
    info = json.loads(KINDS["gpt2"]().to_str())
    vocab, merges = info["model"]["vocab"], info["model"]["merges"]
    first, second = ("".join(merge) for merge in merges[:2])
    vocab[first], vocab[second] = vocab[second], vocab[first]
    with pytest.raises(ValueError, match="ids in another order than its merges"):
        tokenizer_json.from_json(info, "turned", len(vocab), [])


def ours_of(kind: str) -> Tokenizer:
    if kind == "bytes":
        return bytes_tokenizer()
    words = Counter(regex.findall(SPLIT, "".join(CORPUS)))
    learned = bpe_tokenizer(words, 600)
    if kind == "cl100k":
        encoding = learned.encoding
        learned.encoding = type(encoding)(
            "cl100k",
            pat_str=CL100K,
            mergeable_ranks=encoding._mergeable_ranks,
            special_tokens=encoding._special_tokens,
        )
    return learned


@pytest.mark.parametrize("kind", ["bytes", "bpe", "cl100k", "qwen3"])
def test_exported_ids_are_ours(kind):
    if kind == "qwen3":
        info = json.loads(qwen3().to_str())
        ours = tokenizer_json.from_json(info, kind, 810, [])
    else:
        ours = ours_of(kind)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json.to_json(ours)))
    theirs.encode_special_tokens = True
    found = theirs.encode_batch_fast(TEXTS)
    assert [ours.encode(t) for t in TEXTS] == [encoding.ids for encoding in found]
    assert theirs.get_vocab_size() == ours.vocab_size
    assert all(theirs.token_to_id(text) == i for text, i in ours.special.items())


def test_an_added_token_that_is_not_special_is_read_in_a_text_and_stored(tmp_path):
    ours = tokenizer_json.from_json(json.loads(qwen3().to_str()), "qwen3", 810, [])
    assert ours.special["<think>"] in ours.encode("a<think>b")
    assert ours.special["<|endoftext|>"] not in ours.encode("a<|endoftext|>b")
    ours.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.digest() == ours.digest() and loaded.end_of_text == ours.end_of_text
    assert [loaded.encode(t) for t in TEXTS[:100]] == [ours.encode(t) for t in TEXTS[:100]]


def test_a_vocabulary_takes_no_memory_because_config_json_says_so(tmp_path):
    bpe(True).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(dict(vocab_size=2**31 - 1)))
    with pytest.raises(ValueError, match="here needs 2147483647 ids, which this one lacks"):
        tokenizer_json.read_folder(tmp_path, "here")


# --- models

SMALL = dict(hidden_size=72, intermediate_size=100, num_hidden_layers=2, num_attention_heads=6)
SMALL |= dict(max_position_embeddings=70)
FEW = SMALL | dict(num_attention_heads=3, num_key_value_heads=1)
TIED = dict(tie_word_embeddings=True)
SCALED = dict(rope_type="llama3", rope_theta=5000.0, factor=8.0, low_freq_factor=1.0)
SCALED |= dict(high_freq_factor=4.0, original_max_position_embeddings=24)
UNEVEN = SMALL | dict(hidden_size=70, head_dim=14, num_key_value_heads=3)  # 70 / 6 heads: no Llama
GPT2 = dict(n_embd=60, n_layer=2, n_head=5, n_positions=65)
MODELS = {
    "gpt2": (tf.GPT2Config, GPT2 | dict(vocab_size=507)),
    "gpt2 untied": (tf.GPT2Config, GPT2 | dict(vocab_size=401, n_inner=99) | dict.fromkeys(TIED)),
    "llama": (tf.LlamaConfig, SMALL | dict(vocab_size=501, num_key_value_heads=2)),
    "llama tied 64": (tf.LlamaConfig, FEW | TIED | dict(vocab_size=499, head_dim=64)),
    "llama 3.1": (tf.LlamaConfig, FEW | dict(vocab_size=498, rope_parameters=SCALED, head_dim=32)),
    "mistral": (tf.MistralConfig, UNEVEN | dict(vocab_size=497, sliding_window=None)),
    "mistral window": (tf.MistralConfig, UNEVEN | TIED | dict(vocab_size=496, sliding_window=70)),
    "qwen2": (tf.Qwen2Config, SMALL | dict(vocab_size=495, num_key_value_heads=3)),
    "qwen2 tied 64": (tf.Qwen2Config, FEW | TIED | dict(vocab_size=494, head_dim=64)),
    "qwen3": (tf.Qwen3Config, SMALL | dict(vocab_size=509, head_dim=24, num_key_value_heads=3)),
    "qwen3 tied 128": (tf.Qwen3Config, FEW | TIED | dict(vocab_size=503, head_dim=128)),
    "nanochat": (tf.NanoChatConfig, SMALL | dict(vocab_size=511, num_key_value_heads=3)),
    "nanochat tied 64": (tf.NanoChatConfig, FEW | TIED | dict(vocab_size=487, head_dim=64)),
    "nanochat bias": (tf.NanoChatConfig, FEW | dict(vocab_size=486, attention_bias=True)),
}


def make_theirs(kind: str, folder, **options):
    """A random model of transformers, saved in `folder` with a tokenizer."""
    cls, settings = MODELS[kind]
    settings = {k: bool(v) if k == "tie_word_embeddings" else v for k, v in settings.items()}
    torch.manual_seed(len(kind))
    model = tf.AutoModelForCausalLM.from_config(cls(**settings)).eval()
    for name, p in model.named_parameters():  # also what transformers sets to zero or one
        p.data = torch.randn(p.shape) * 0.1 + (p.ndim == 1 and name.endswith("weight"))
        if name.endswith("o_proj.bias"):  # which we have beside biases of the MLP only
            p.data.zero_()
    model.to(options.pop("dtype", torch.float32)).save_pretrained(folder, **options)
    size = settings["vocab_size"] - 3
    words = qwen(vocab_size=size) if kind.startswith("qwen2") else bpe(True, vocab_size=size)
    words.save(str(folder / "tokenizer.json"))
    return model


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """both(kind): a model of transformers, and the folder of theirs and of ours."""
    made = {}

    def make(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp("both")
            model = make_theirs(kind, folder / "theirs")
            huggingface.main(["import", str(folder / "theirs"), str(folder / "ours")])
            made[kind] = (model, folder / "theirs", folder / "ours")
        return made[kind]

    return make


def logits(model, tokens):
    with torch.no_grad():
        out = model(tokens)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize("kind", MODELS)
def test_an_imported_model_computes_what_it_computed_there(kind, both):
    theirs, _, folder = both(kind)
    ours, tokenizer = load_model(folder)
    assert tokenizer.vocab_size == ours.config.vocab_size == theirs.config.vocab_size
    tokens = torch.randint(ours.config.vocab_size, (2, ours.config.block_size))
    assert (logits(ours, tokens) - logits(theirs, tokens)).abs().max() < 1e-5
    greedy = [i for (i,) in generate(ours, tokens[0, :5].tolist(), 40, temperature=0)]
    mask = torch.ones(1, 5, dtype=torch.long)
    options = dict(max_new_tokens=40, do_sample=False, eos_token_id=None, attention_mask=mask)
    assert greedy == theirs.generate(tokens[:1, :5], **options)[0, 5:].tolist()


@pytest.mark.parametrize("kind", MODELS)
def test_an_exported_model_computes_what_it_computes_here(kind, both, tmp_path):
    theirs, _, folder = both(kind)
    ours, tokenizer = load_model(folder)
    huggingface.main(["export", str(folder), str(tmp_path / "out")])
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(model) is type(theirs)
    tokens = torch.randint(ours.config.vocab_size, (2, ours.config.block_size))
    assert (logits(ours, tokens) - logits(model, tokens)).abs().max() < 1e-5
    for config in (model.config, model.generation_config):
        ids = {config.bos_token_id, config.eos_token_id, config.pad_token_id}
        assert ids == {tokenizer.end_of_text}
    words = tf.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [words(t).input_ids for t in TEXTS[:200]] == [tokenizer.encode(t) for t in TEXTS[:200]]
    assert words.eos_token_id == words.pad_token_id == tokenizer.end_of_text


@pytest.mark.parametrize("kind", MODELS)
def test_export_and_import_give_identical_bits(kind, both, tmp_path):
    _, _, folder = both(kind)
    huggingface.main(["export", str(folder), str(tmp_path / "out")])
    huggingface.main(["import", str(tmp_path / "out"), str(tmp_path / "again")])
    assert_equal(folder, tmp_path / "again")


def assert_equal(one, two):
    (a, t), (b, u) = load_model(one), load_model(two)
    assert a.config == b.config and t.digest() == u.digest()
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(a.state_dict()[k], w) for k, w in b.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_shards_is_imported_exactly(dtype, tmp_path):
    make_theirs("nanochat", tmp_path / "in", dtype=dtype, max_shard_size="100KB")
    theirs = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=torch.float32).eval()
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    huggingface.main(["import", str(tmp_path / "in"), str(tmp_path / "out")])
    ours, _ = load_model(tmp_path / "out")
    tokens = torch.randint(500, (2, 70))
    assert (logits(ours, tokens) - logits(theirs, tokens)).abs().max() < 1e-5


def test_gpt2_is_read_from_the_files_of_2019(tmp_path):
    """No prefix in the names, buffers among them, vocab.json and merges.txt, a sparse config."""
    theirs = make_theirs("gpt2", tmp_path / "new")
    old = tmp_path / "old"
    old.mkdir()
    weights = load_file(tmp_path / "new" / "model.safetensors")
    weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
    save_file(weights | {"h.0.attn.bias": torch.ones(1, 1, 65, 65)}, old / "model.safetensors")
    settings = dict(model_type="gpt2", vocab_size=507, **GPT2)
    (old / "config.json").write_text(json.dumps(settings))
    info = json.loads((tmp_path / "new" / "tokenizer.json").read_text())["model"]
    (old / "vocab.json").write_text(json.dumps(info["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in info["merges"])
    (old / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    huggingface.main(["import", str(old), str(tmp_path / "out")])
    ours, tokenizer = load_model(tmp_path / "out")
    tokens = torch.randint(507, (1, 65))
    assert (logits(ours, tokens) - logits(theirs, tokens)).abs().max() < 1e-5
    there = tokenizers.Tokenizer.from_file(str(tmp_path / "new" / "tokenizer.json"))
    there.encode_special_tokens = True
    assert [tokenizer.encode(t) for t in TEXTS[:200]] == [there.encode(t).ids for t in TEXTS[:200]]


CLASSIC = ["--position=learned", "--norm=layer", "--norm_weight=true", "--embed_norm=false"]
CLASSIC += ["--qk_norm=false", "--mlp=gelu", "--logit_cap=0", "--tied=true"]


SMALL_PY = ["--qkv_bias=true", "--logit_cap=0"]


@pytest.mark.parametrize(
    "shape", [[], SMALL_PY, CLASSIC], ids=["modern", "small.py", "gpt2 without biases"]
)
def test_a_model_trained_here_writes_the_same_text_in_a_pipeline(shape, train, tmp_path, capsys):
    import sample

    run, out = train("run", "--lr=0.05", "--steps=30", "--block_size=64", *shape), tmp_path / "out"
    huggingface.main(["export", str(run), str(out)])
    pipe = tf.pipeline("text-generation", model=str(out), device="cpu")
    for prompt in ("the ", "Zoë 模型🙂 <|endoftext|>", ""):
        theirs = pipe(prompt, max_new_tokens=30, do_sample=False)[0]["generated_text"]
        capsys.readouterr()
        argv = [f"--prompt={prompt}", "--max_tokens=30", "--temperature=0", "--dtype=float32"]
        sample.main([str(run), *argv])
        assert capsys.readouterr().out == theirs + "\n"
    huggingface.main(["import", str(out), str(tmp_path / "again")])
    assert_equal(run, tmp_path / "again")
    card = (out / "README.md").read_text()
    facts = json.loads(next(run.glob("step-*/state.json")).read_text())
    for fact in (facts["data_digest"], '"tokens_seen": 7680', '"val_loss": ', '"lr": 0.05'):
        assert fact in card


def test_the_card_of_an_early_checkpoint_tells_nothing_of_later_steps(train, tmp_path):
    run, out = train("run", "--lr=0.05"), tmp_path / "out"
    huggingface.main(["export", str(run / "step-00000004"), str(out)])
    card = json.loads((out / "README.md").read_text().split("```")[1].removeprefix("json"))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    early, late = (row for row in map(json.loads, lines) if "val_loss" in row)
    assert card["val_loss"] == early["val_loss"] != late["val_loss"]
    assert card["updates"] == 4


def test_stored_numbers_are_aligned_however_long_the_header_is(tmp_path):
    for length in range(1, 9):
        path, name = tmp_path / f"{length}.safetensors", "w" * length
        tensors.write_safetensors(path, {name: [2]}, [torch.ones(2)])
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
        assert load_file(path)[name].tolist() == [1, 1]


# --- what begins a prompt, and what ends a sample

BEGIN = "<|begin|>"
TEMPLATE = tokenizers.processors.TemplateProcessing(
    single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, 1)]
)
LLAMA3_TEMPLATE = [tokenizers.processors.ByteLevel(trim_offsets=False), TEMPLATE]
BEGINNINGS = {  # a post-processor, and tokenizer_config.json
    "template": (TEMPLATE, {}),
    "as llama 3": (tokenizers.processors.Sequence(LLAMA3_TEMPLATE), {}),
    "whatever add_bos_token says": (TEMPLATE, dict(add_bos_token=False, bos_token=BEGIN)),
    "none": (tokenizers.processors.ByteLevel(), dict(add_bos_token=True, bos_token=BEGIN)),
}


@pytest.fixture
def chat(tmp_path):
    """A model with a beginning and two ends, which writes the second end soon after "the "."""
    theirs = make_theirs("llama", tmp_path / "in")
    words = bpe(True, vocab_size=501, special=("<|endoftext|>", BEGIN, "<|eot|>"))
    words.post_processor = TEMPLATE
    words.save(str(tmp_path / "in" / "tokenizer.json"))
    prompt = torch.tensor([words.encode("the ").ids])
    written = theirs.generate(prompt, eos_token_id=None, max_new_tokens=9, do_sample=False)
    with torch.no_grad():
        state = theirs.model(written).last_hidden_state[0, -1]  # (C,)
        theirs.lm_head.weight[2] = state / state.norm()
    theirs.config.eos_token_id = theirs.generation_config.eos_token_id = [0, 2]
    theirs.save_pretrained(tmp_path / "in")
    return tmp_path / "in"


@pytest.mark.parametrize("kind", BEGINNINGS)
def test_a_prompt_begins_as_in_transformers(kind, chat, tmp_path):
    words = tokenizers.Tokenizer.from_file(str(chat / "tokenizer.json"))
    post, settings = BEGINNINGS[kind]
    words.post_processor = post
    words.save(str(chat / "tokenizer.json"))
    settings |= dict(tokenizer_class="PreTrainedTokenizerFast", split_special_tokens=True)
    (chat / "tokenizer_config.json").write_text(json.dumps(settings))
    huggingface.main(["import", str(chat), str(tmp_path / "ours")])
    huggingface.main(["export", str(tmp_path / "ours"), str(tmp_path / "out")])
    ours = Tokenizer.load(tmp_path / "ours")
    assert ours.begin == ([] if kind == "none" else [1])
    for folder in (chat, tmp_path / "out"):
        theirs = tf.AutoTokenizer.from_pretrained(folder)
        for text in TEXTS[:200]:
            assert theirs(text).input_ids == ours.begin + ours.encode(text)
    assert ours.encode_prompt("") == (ours.begin or [ours.end_of_text])


def test_samples_begin_and_end_as_in_a_pipeline(chat, tmp_path, capsys):
    import sample

    huggingface.main(["import", str(chat), str(tmp_path / "ours")])
    huggingface.main(["export", str(tmp_path / "ours"), str(tmp_path / "out")])
    huggingface.main(["import", str(tmp_path / "out"), str(tmp_path / "again")])
    assert_equal(tmp_path / "ours", tmp_path / "again")
    assert Tokenizer.load(tmp_path / "ours").ends == [0, 2]
    pipes = [tf.pipeline("text-generation", model=str(f)) for f in (chat, tmp_path / "out")]
    lengths = set()
    for prompt in ("", "the ", "Zoe and a "):
        argv = [f"--prompt={prompt}", "--max_tokens=40", "--temperature=0", "--dtype=float32"]
        capsys.readouterr()
        sample.main([str(tmp_path / "ours"), *argv])
        text = capsys.readouterr().out
        for pipe in pipes:
            there = pipe(prompt, max_new_tokens=40, do_sample=False, return_tensors=True)
            ids = there[0]["generated_token_ids"]
            lengths.add(len(ids) - len(pipe.tokenizer(prompt).input_ids))
            begin, *ids = ids[:-1] if ids[-1] in (0, 2) else ids
            assert begin == 1 and pipe.tokenizer.decode(ids) + "\n" == text
    assert 0 < min(lengths) < 40


def test_a_tokenizer_that_needs_none_of_this_is_stored_as_ever():
    plain = json.loads(bytes_tokenizer().files()["encoding.json"])
    assert not {"begin", "ends", "end_of_text"} & plain.keys()


def test_who_exports_a_qwen2_with_other_words_is_told(tmp_path, capsys):
    make_theirs("qwen2", tmp_path / "in")
    bpe(True, vocab_size=490).save(str(tmp_path / "in" / "tokenizer.json"))
    huggingface.main(["import", str(tmp_path / "in"), str(tmp_path / "ours")])
    huggingface.main(["export", str(tmp_path / "ours"), str(tmp_path / "out")])
    assert "open it with PreTrainedTokenizerFast" in capsys.readouterr().err
    words = tf.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    ours = Tokenizer.load(tmp_path / "ours")
    assert [words(t).input_ids for t in TEXTS[:200]] == [ours.encode(t) for t in TEXTS[:200]]


def test_a_mistral_whose_window_never_bites_leaves_as_the_llama_that_it_is(tmp_path):
    settings = tf.MistralConfig(**SMALL, vocab_size=400, num_key_value_heads=2, sliding_window=99)
    theirs = tf.AutoModelForCausalLM.from_config(settings).eval()
    theirs.save_pretrained(tmp_path / "in")
    bpe(True, vocab_size=400).save(str(tmp_path / "in" / "tokenizer.json"))
    huggingface.main(["import", str(tmp_path / "in"), str(tmp_path / "ours")])
    huggingface.main(["export", str(tmp_path / "ours"), str(tmp_path / "out")])
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(model) is tf.LlamaForCausalLM
    tokens = torch.randint(400, (2, 70))
    assert (logits(model, tokens) - logits(theirs, tokens)).abs().max() < 1e-5


def test_a_scaling_in_the_form_before_version_5_is_the_same(both, tmp_path):
    _, theirs, ours = both("llama 3.1")
    shutil.copytree(theirs, tmp_path / "in")
    scaling = {key: value for key, value in SCALED.items() if key != "rope_theta"}
    older = dict(rope_parameters=None, rope_scaling=scaling, rope_theta=SCALED["rope_theta"])
    rewrite(**older)(tmp_path / "in")
    huggingface.main(["import", str(tmp_path / "in"), str(tmp_path / "ours")])
    assert load_model(ours)[0].config == load_model(tmp_path / "ours")[0].config


def test_training_goes_on_from_what_was_imported(train, data, tmp_path):
    run = train("run")
    huggingface.main(["export", str(run), str(tmp_path / "out")])
    huggingface.main(["import", str(tmp_path / "out"), str(tmp_path / "in")])
    options = ["--lr=0", "--embed_lr=0", "--head_lr=0", "--block_size=16", "--dropout=0.1"]
    tuned = train("tuned", f"--init_from={tmp_path / 'in'}", *options)
    (a, _), (b, _) = load_model(run, "latest"), load_model(tuned, "latest")
    assert b.config.block_size == 16 and torch.equal(a.wte.weight, b.wte.weight)


def test_importing_takes_little_more_memory_than_the_largest_weight(tmp_path):
    shape = GPTConfig(257, 64, n_layer=8, n_head=8, n_embd=384)
    family, _, settings = families.to_config(shape)
    there = families.layout(family, shape)
    weights = {name: torch.ones(w.shape) for name, parts in there.items() for w in parts.values()}
    (tmp_path / "in").mkdir()
    save_file(weights, tmp_path / "in" / "model.safetensors")
    huggingface.write_json(tmp_path / "in" / "config.json", settings)
    huggingface.write_json(
        tmp_path / "in" / "tokenizer.json", tokenizer_json.to_json(bytes_tokenizer())
    )
    size = (tmp_path / "in" / "model.safetensors").stat().st_size
    code = (
        "import resource, sys, torch, safetensors.torch, huggingface\n"
        "import engine.families, engine.tokenizer_json\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "torch.zeros(1).float().numpy(); before = peak()\n"
        f"huggingface.main(['import', {str(tmp_path / 'in')!r}, {str(tmp_path / 'out')!r}])\n"
        "print((peak() - before) * (1 if sys.platform == 'darwin' else 1024))\n"
    )
    (tmp_path / "peak.py").write_text(code)
    env = os.environ | {"PYTHONPATH": str(huggingface.Path(huggingface.__file__).parent)}
    command = [sys.executable, tmp_path / "peak.py"]  # a fork counts the libraries that it touches
    grown = int(subprocess.check_output(command, env=env).split()[-1])
    assert size > 50_000_000 and grown < size / 2


# --- mistakes


def rewrite(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def rewrite_tokenizer(**changes):
    def change(folder):
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def cut(length):
    def change(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:length])

    return change


def sharded(shard):
    def change(folder):
        (folder / "model.safetensors").rename(folder / "one.safetensors")
        shards = dict(weight_map=dict(a="one.safetensors", b=shard))
        (folder / "model.safetensors.index.json").write_text(json.dumps(shards))

    return change


def twice(folder):
    shutil.copy(folder / "model.safetensors", folder / "two.safetensors")
    sharded("two.safetensors")(folder)


def header(change, length=None):
    """Replaces the header of a safetensors file by `change` of it, and says another length."""

    def damage(folder):
        path = folder / "model.safetensors"
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        text = change(content[8:end])
        size = len(text) if length is None else length
        path.write_bytes(size.to_bytes(8, "little") + text + content[end:])

    return damage


def with_offsets(first: int):
    """One tensor of the header, of 400 bytes, is said to stand elsewhere."""
    name = "model.norm.weight"

    def change(text):
        tensors = json.loads(text)
        tensors[name]["data_offsets"] = [first, first + 288]
        return json.dumps(tensors).encode()

    return header(change)


def nested(name):
    return lambda folder: (folder / name).write_text('{"a": ' + "[" * 200_000)


def with_tensor(name: str, tensor):
    def change(folder):
        weights = load_file(folder / "model.safetensors")
        save_file(weights | {name: tensor}, folder / "model.safetensors")

    return change


def scaling(kind: str) -> dict:
    return dict(rope_type=kind, factor=8.0, rope_theta=10000.0)


CUT = "model.safetensors is missing, damaged or cut short"
MISTAKES = {
    "truncated": (cut(-1), CUT),
    "truncated header": (cut(50), CUT),
    "empty file": (cut(0), CUT),
    "missing shard": (sharded("two.safetensors"), "two.safetensors is missing, damaged"),
    "shard outside": (sharded("../in/one.safetensors"), "'../in/one.safetensors', no file beside"),
    "absolute shard": (sharded("/etc/passwd"), "'/etc/passwd', no file beside it"),
    "windows shard": (sharded("..\\one.safetensors"), "no file beside it"),
    "folder as shard": (sharded(".."), "damaged"),
    "number as shard": (sharded(3), "names 3, no file beside it"),
    "list as shard": (sharded([]), r"names \[\], no file beside it"),
    "tensors twice": (twice, "two.safetensors is damaged: it has a second tensor"),
    "header of gigabytes": (header(bytes, 2**40), CUT),
    "header of eternity": (header(bytes, 2**64 - 1), CUT),
    "no header": (header(lambda _: b"Not a header."), CUT),
    "list as header": (header(lambda _: b"[1, 2]"), CUT),
    "tensor outside": (with_offsets(2**50), CUT),
    "tensor in another": (with_offsets(0), CUT),
    "empty tensor": (
        with_tensor("more", torch.zeros(2**40, 0)),
        r"more of .* is \[109.*, 0\]",
    ),
    "scalar": (with_tensor("more", torch.tensor(1.0)), r"model.more of .* is \[\]: its"),
    "pickle": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "pytorch_model.bin is a pickle.*convert it.*save_pretrained",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no model.safetensors"),
    "wrong shape": (rewrite(intermediate_size=99), r"is \[72, 100\]: its .*implies \[72, 99\]"),
    "missing tensor": (
        rewrite(num_hidden_layers=3),
        r"layers.2.* is missing: .* implies \[72",
    ),
    "spare tensor": (rewrite(num_hidden_layers=1), "model.layers.1.* implies no such tensor"),
    "absurd size": (rewrite(num_hidden_layers=10**4), "too few for 10000 layers"),
    "absurd vocabulary": (rewrite(vocab_size=2**31 - 1), "no tensor has the size 2147483647"),
    "absurd width": (rewrite(hidden_size=2**31 - 2), "no tensor has the size 2147483646"),
    "absurd head": (rewrite(head_dim=2**31 - 2), "no tensor has the size 12884901876"),
    "absurd context": (
        rewrite(max_position_embeddings=2**31 - 1),
        "max_position_embeddings=2147483647 should be from 1 to 1,048,576",
    ),
    "negative size": (rewrite(vocab_size=-1), "vocab_size=-1 should be"),
    "not a number": (
        rewrite(rope_parameters=dict(rope_theta=float("nan"))),
        "rope_theta='nan' should be a number",
    ),
    "text for rope": (rewrite(rope_parameters="yes"), "config.json is damaged"),
    "nested config": (nested("config.json"), "config.json is missing or damaged"),
    "nested tokenizer": (nested("tokenizer.json"), "tokenizer.json is missing or damaged"),
    "integers": (
        with_tensor("model.norm.weight", torch.zeros(72, dtype=torch.int8)),
        "needs I8 weights",
    ),
    "no setting": (rewrite(hidden_size=None), "hidden_size='None' should be a whole number"),
    "text for a number": (rewrite(rms_norm_eps="a"), "rms_norm_eps='a' should be a number"),
    "architecture": (rewrite(model_type="mamba", architectures=["Mamba"]), "has Mamba, but only"),
    "rotary scaling": (rewrite(rope_parameters=scaling("yarn")), "needs a rotary scaling .yarn"),
    "other waves": (
        rewrite(rope_parameters=SCALED | dict(high_freq_factor=2.0)),
        "needs high_freq_factor=2.0 of its rotary scaling",
    ),
    "scaled by nothing": (
        rewrite(rope_parameters=SCALED | dict(factor=0)),
        "factor=0.0 should be at least 1",
    ),
    "scaled from nothing": (
        rewrite(rope_parameters=SCALED | dict(original_max_position_embeddings=None)),
        "original_max_position_embeddings='None' should be",
    ),
    "part of the channels": (
        rewrite(rope_parameters=dict(partial_rotary_factor=0.5)),
        "needs partial_rotary_factor=0.5 of its rotary scaling",
    ),
    "positions by layer": (
        rewrite(rope_parameters=dict(full_attention=dict(rope_theta=10000.0))),
        "needs full_attention=.* of its rotary scaling",
    ),
    "older scaling": (
        rewrite(rope_parameters=None, rope_scaling=dict(type="linear", factor=2.0)),
        "needs a rotary scaling .linear",
    ),
    "bias": (rewrite(attention_bias=True), "needs attention_bias=True"),
    "bias tensor": (
        with_tensor("model.layers.0.self_attn.q_proj.bias", torch.ones(72)),
        r"model.layers.0.self_attn.q_proj.bias of .* is \[72\]: .* implies no such tensor",
    ),
    "window": (
        rewrite(layer_types=["full_attention", "sliding_attention"]),
        "needs layers of the type sliding_attention",
    ),
    "shorter window": (
        rewrite(model_type="mistral", sliding_window=50),
        "needs sliding_window=50, which",
    ),
    "activation": (rewrite(hidden_act="gelu"), "needs hidden_act=gelu"),
    "quantised": (rewrite(quantization_config=dict(bits=4)), "needs quantization_config"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json is missing or damaged"),
    "half a tokenizer": (
        lambda d: (d / "tokenizer.json").write_bytes((d / "tokenizer.json").read_bytes()[:99]),
        "tokenizer.json is missing or damaged",
    ),
    "no tokenizer model": (rewrite_tokenizer(model=None), "damaged, or of an unknown kind"),
    "unigram": (rewrite_tokenizer(model=dict(type="Unigram", vocab=[])), "needs SentencePiece"),
    "metaspace": (rewrite_tokenizer(pre_tokenizer=dict(type="Metaspace")), "needs SentencePiece"),
    "lower case": (rewrite_tokenizer(normalizer=dict(type="Lowercase")), "needs the normaliser"),
    "prefix space": (
        rewrite_tokenizer(pre_tokenizer=dict(type="ByteLevel", add_prefix_space=True)),
        "needs a space before the text",
    ),
    "sentencepiece": (
        lambda d: (d / "tokenizer.json").rename(d / "tokenizer.model"),
        "needs SentencePiece",
    ),
    "small model": (
        lambda d: rewrite_tokenizer(added_tokens=[dict(id=9999, content="<x>", special=True)])(d),
        "has id 9999, its model only 501",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_read_is_refused_by_name_and_leaves_nothing(mistake, both, tmp_path):
    change, sentence = MISTAKES[mistake]
    shutil.copytree(both("llama")[1], tmp_path / "in")
    change(tmp_path / "in")
    with pytest.raises(ValueError, match=sentence) as raised:
        huggingface.main(["import", str(tmp_path / "in"), str(tmp_path / "out")])
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_bias_behind_the_heads_is_refused_unless_it_is_zero(both, tmp_path):
    shutil.copytree(both("nanochat bias")[1], tmp_path / "in")
    with_tensor("model.layers.1.self_attn.o_proj.bias", torch.ones(72))(tmp_path / "in")
    with pytest.raises(ValueError, match="needs a bias that is not zero .model.layers.1.self_attn"):
        huggingface.main(["import", str(tmp_path / "in"), str(tmp_path / "out")])


def test_files_have_the_permissions_that_the_umask_leaves(both, tmp_path):
    before = os.umask(0o027)
    try:
        huggingface.main(["import", str(both("llama")[1]), str(tmp_path / "ours")])
        huggingface.main(["export", str(tmp_path / "ours"), str(tmp_path / "out")])
    finally:
        os.umask(before)
    files = [*(tmp_path / "ours").iterdir(), *(tmp_path / "out").iterdir()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}
    folders = (tmp_path / "ours", tmp_path / "out")
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o750}


@pytest.mark.parametrize("other", ["mlp=swiglu", "canon=4"])
def test_shapes_that_transformers_lacks_are_refused_by_name(other, train, tmp_path):
    run = train("run", f"--{other}")
    with pytest.raises(ValueError, match=rf"NanoChatForCausalLM, but for {other}"):
        huggingface.main(["export", str(run), str(tmp_path / "out")])


def test_a_mistake_on_the_command_line_is_one_sentence_and_status_2(both, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("")
    theirs = str(both("llama")[1])
    for argv, sentence in {
        (): "say what to do",
        ("improt", theirs, "out"): "say what to do",
        ("import", theirs, str(full)): "exists already: choose another target",
        ("import", "./nowhere", str(tmp_path / "out")): "no such folder: './nowhere'",
        ("import", "gpt2", str(tmp_path / "out")): "no such folder: 'gpt2', and no model of that",
        ("export", theirs, str(tmp_path / "out")): "holds no checkpoint",
    }.items():
        said = forked.run("huggingface.py", *argv, status=2)
        assert sentence in said and said.count("\n") == 1, said
    assert list(full.iterdir()) == [full / "file"] and not (tmp_path / "out").exists()
