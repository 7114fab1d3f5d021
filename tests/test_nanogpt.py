"""nanoGPT's ckpt.pt: the same logits as in nanoGPT, and nothing of a pickle is ever run."""

import functools
import itertools
import pickle
import re
import types
import zipfile

import pytest
import tiktoken
import torch
import torch.nn.functional as F

import huggingface
import sample
from engine.checkpoint import load_model
from engine.metrics import read_metrics

ARGS = dict(n_layer=3, n_head=4, n_embd=32, block_size=32, bias=True, vocab_size=320, dropout=0.1)
H = "transformer.h.{}."


def forward(w: dict, tokens, gelu: str = "none"):
    """Logits of nanoGPT with the weights `w`, from the drawing of GPT-2: (B, T) to (B, T, V)."""

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w.get(f"{name}.bias"), 1e-5)

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    T = tokens.size(1)
    future = torch.ones(T, T).triu(1).bool()
    x = w["transformer.wte.weight"][tokens] + w["transformer.wpe.weight"][:T]
    for i in range(ARGS["n_layer"]):
        h = H.format(i)
        qkv = linear(h + "attn.c_attn", norm(h + "ln_1", x)).chunk(3, dim=-1)  # in this order
        q, k, v = (z.unflatten(-1, (ARGS["n_head"], -1)).transpose(1, 2) for z in qkv)
        scores = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(future, -torch.inf)
        x = x + linear(h + "attn.c_proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        wide = F.gelu(linear(h + "mlp.c_fc", norm(h + "ln_2", x)), approximate=gelu)
        x = x + linear(h + "mlp.c_proj", wide)
    return norm("transformer.ln_f", x) @ w["lm_head.weight"].T


def random_weights(**args) -> dict:
    """A state dict as nanoGPT has it: matrices are (out, in), the head is the embedding."""
    a = ARGS | args
    C, rows = a["n_embd"], dict(wte=a["vocab_size"], wpe=a["block_size"])
    shapes = {f"transformer.{name}": (n, C) for name, n in rows.items()} | {"transformer.ln_f": C}
    for h in map(H.format, range(a["n_layer"])):
        shapes |= {h + "ln_1": C, h + "attn.c_attn": (3 * C, C), h + "attn.c_proj": (C, C)}
        shapes |= {h + "ln_2": C, h + "mlp.c_fc": (4 * C, C), h + "mlp.c_proj": (C, 4 * C)}
    torch.manual_seed(0)
    w = {}
    for name, shape in shapes.items():
        norm = shape == C
        w[name + ".weight"] = torch.randn(shape) * 0.1 + norm
        if a["bias"] and not name.endswith(("wte", "wpe")):
            w[name + ".bias"] = torch.randn(C if norm else shape[0]) * 0.1
    return w | {"lm_head.weight": w["transformer.wte.weight"]}


def save(path, w: dict, change=None, **args) -> str:
    """Writes what nanoGPT's train.py writes."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    content = dict(model=w, optimizer=optimizer.state_dict(), model_args=ARGS | args)
    content |= dict(iter_num=5, best_val_loss=torch.tensor(3.2), config=dict(dataset="mine"))
    torch.save(change(content) if change else content, path)
    return str(path)


BYTES = ["--tokenizer=bytes"]  # 257 of them, padded to 320


def bring(path, out, *options) -> str:
    huggingface.main(["import", str(path), str(out), *(options or BYTES)])
    return str(out)


@functools.cache
def gpt2(name: str) -> tiktoken.Encoding:
    """A vocabulary as large as GPT-2's, which would have to be downloaded."""
    pairs = itertools.islice(itertools.product(range(256), repeat=2), 50_000)
    ranks = {bytes([i]): i for i in range(256)} | {bytes(p): 256 + i for i, p in enumerate(pairs)}
    special = {"<|endoftext|>": 50256}
    return tiktoken.Encoding(
        name, pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=special
    )


# --- what comes in


@pytest.mark.parametrize("bias", [True, False])
def test_an_imported_checkpoint_computes_what_nanogpt_computes(bias, tmp_path, capsys):
    w = random_weights(bias=bias)
    ours, _ = load_model(bring(save(tmp_path / "ckpt.pt", w, bias=bias), tmp_path / "ours"))
    assert (
        "63 rows of the vocabulary, which only pad it to 320, are left out"
        in capsys.readouterr().out
    )
    assert ours.config.vocab_size == 257 and ours.config.tied and ours.config.bias == bias
    tokens = torch.randint(257, (4, 32))
    with torch.no_grad():
        found, there = ours(tokens), forward(w, tokens)[..., :257]
        assert (found - forward(w, tokens, "tanh")[..., :257]).abs().max() < 1e-5
    # later versions have GELU's exact form. The two differ by at most 5e-4, and a sum of 128 such
    # errors of any sign, through weights of 0.1, by no more than some such differences
    x = torch.linspace(-9, 9, 9001)
    assert (F.gelu(x) - F.gelu(x, approximate="tanh")).abs().max() < 5e-4
    assert (found - there).abs().max() < 5e-3 < there.std() / 50


def test_names_of_a_compiled_model_and_buffers_of_an_older_one_change_nothing(tmp_path):
    w = random_weights()
    buffers = {H.format(i) + "attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(3)}
    compiled = {f"_orig_mod.{name}": p for name, p in (w | buffers).items()}
    odd = compiled["_orig_mod.transformer.ln_f.weight"] = torch.nn.Parameter(torch.ones(32))
    odd.data, odd.detach = w["transformer.ln_f.weight"].clone(), "an attribute, which is kept"
    one = bring(save(tmp_path / "one.pt", w), tmp_path / "one")
    two = bring(save(tmp_path / "two.pt", compiled), tmp_path / "two")
    a, b = (load_model(run)[0].state_dict() for run in (one, two))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_head_of_its_own_and_settings_left_out_are_those_of_the_oldest_version(tmp_path):
    w = random_weights() | {"lm_head.weight": torch.randn(320, 32) * 0.1}

    def older(content):
        del content["model_args"]["bias"]
        return content

    ours, _ = load_model(bring(save(tmp_path / "ckpt.pt", w, older), tmp_path / "ours"))
    tokens = torch.randint(257, (2, 32))
    with torch.no_grad():
        assert (ours(tokens) - forward(w, tokens, "tanh")[..., :257]).abs().max() < 1e-5
    assert not ours.config.tied


@pytest.mark.parametrize("rows", [50257, 50304])
def test_the_vocabulary_is_that_of_gpt2_unless_another_is_named(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", gpt2)
    w = random_weights(vocab_size=rows)
    path = save(tmp_path / "ckpt.pt", w, vocab_size=rows)
    huggingface.main(["import", path, str(tmp_path / "ours")])
    ours, tokenizer = load_model(tmp_path / "ours")
    assert tokenizer.name == "gpt2" and ours.config.vocab_size == tokenizer.vocab_size == 50257
    assert torch.equal(ours.wte.weight, w["transformer.wte.weight"][:50257])


def test_sampling_training_and_exporting_go_on_from_it(train, tmp_path, capsys):
    w = random_weights()
    mine = bring(save(tmp_path / "ckpt.pt", w), tmp_path / "mine")
    capsys.readouterr()
    sample.main([mine, "--prompt=the ", "--max_tokens=20", "--dtype=float32"])
    assert capsys.readouterr().out.startswith("the ")
    run = train("tuned", f"--init_from={mine}", "--lr=0.01", "--steps=20", "--optimizer=adamw")
    first, *_, last = (row["loss"] for row in read_metrics(run) if "loss" in row)
    assert last < first - 0.5
    assert load_model(run)[0].config.mlp == "gelu"
    huggingface.main(["export", mine, str(tmp_path / "hf")])
    again = bring_folder(tmp_path / "hf", tmp_path / "again")
    assert torch.equal(load_model(again)[0].wte.weight, w["transformer.wte.weight"][:257])


def bring_folder(folder, out):
    huggingface.main(["import", str(folder), str(out)])
    return out


# --- what stays out


class Program:
    """Whoever unpickles one writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def with_(**more):
    return lambda content: content | more


def without(key: str):
    return lambda content: {k: v for k, v in content.items() if k != key}


def args(**more):
    return lambda content: content | dict(model_args=content["model_args"] | more)


def tensor(name: str, w):
    return lambda content: content | dict(model=content["model"] | {name: w})


def repeated(w: dict) -> dict:
    """A small file of a large model: all layers are the first."""
    return {name: w[re.sub(r"\.h\.\d+", ".h.0", name)] for name in w}


HEADLESS = {k: v for k, v in ARGS.items() if k != "n_head"}
MISTAKES = {
    "an object": (
        with_(config=types.SimpleNamespace()),
        r"more in it.*types.SimpleNamespace.*trust",
    ),
    "a tensor alone": (lambda _: torch.ones(3), "is no checkpoint of nanoGPT: that has model"),
    "no model_args": (
        without("model_args"),
        "is no checkpoint of nanoGPT.*numbers with block_size",
    ),
    "no model": (without("model"), "is no checkpoint of nanoGPT"),
    "no n_head": (with_(model_args=HEADLESS), "is no checkpoint of nanoGPT.*n_head"),
    "characters": (args(vocab_size=65), "has 65 tokens, and bytes 257: .* --tokenizer=bytes"),
    "another vocabulary": (args(vocab_size=400), "has 400 tokens, and bytes 257: name its own"),
    "another part": (args(rotary=True), "model_args of .*: rotary: set, and in this version"),
    "no number": (args(n_layer="two"), "model_args of .*: n_layer='two' should be a whole number"),
    "too many heads": (
        args(n_head=5),
        "model_args of .*: n_embd=32 .* multiple of n_head=5",
    ),
    "too few layers": (args(n_layer=2), "h.2.* of .*: its model_args implies no such tensor"),
    "absurd width": (args(n_embd=2**30), "no tensor has the size .* that model_args implies"),
    "fewer rows": (tensor("transformer.wte.weight", torch.ones(300, 32)), r"is \[300, 32\]: its"),
    "a number": (
        tensor("transformer.ln_f.bias", 1.0),
        "ln_f.bias' of its model is no whole tensor",
    ),
    "a repeated row": (
        tensor("transformer.wpe.weight", torch.ones(1, 32).expand(32, 32)),
        "'transformer.wpe.weight' of its model is no whole tensor",
    ),
    "negated": (
        tensor("transformer.ln_f.bias", torch._neg_view(torch.ones(32))),
        "no whole tensor",
    ),
    "a name that reaches the terminal": (
        tensor("a\n\x1b[31m", torch.ones(2)),
        r"'a\\n\\x1b\[31m' of its model",
    ),
    "a tensor twice": (
        tensor("_orig_mod.transformer.wpe.weight", torch.ones(32, 32)),
        "'transformer.wpe.weight' of its model is no whole tensor",
    ),
    "one layer as all": (
        lambda content: content | dict(model=repeated(content["model"])),
        "the tensors of its model have numbers in common",
    ),
    "lists of lists": (args(n_layer=[[2]]), "is no checkpoint of nanoGPT.*a dict of numbers"),
    "a tensor as number": (args(bias=torch.ones(2)), "is no checkpoint of nanoGPT.*of numbers"),
    "integers": (
        tensor("transformer.ln_f.bias", torch.ones(32).int()),
        "needs torch.int32 weights",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_another_file_is_refused_in_one_sentence_and_leaves_nothing(mistake, tmp_path):
    change, sentence = MISTAKES[mistake]
    path = save(tmp_path / "ckpt.pt", random_weights(), change)
    refused(path, tmp_path / "out", sentence)


def refused(path, out, sentence, *options):
    before = sorted(out.parent.iterdir())
    with pytest.raises(ValueError, match=sentence) as raised:
        bring(path, out, *options)
    assert "\n" not in str(raised.value)
    assert sorted(out.parent.iterdir()) == before


def test_a_program_in_a_pickle_is_never_run(tmp_path):
    ran, path = tmp_path / "ran", tmp_path / "ckpt.pt"
    save(path, random_weights(), with_(config=Program(str(ran))))
    refused(path, tmp_path / "out", r"more in it than tensors and plain values \('.*open'\)")
    path.write_bytes(pickle.dumps(dict(model=Program(str(ran)))))  # as torch wrote before 1.6
    refused(path, tmp_path / "out", "damaged, or no file that torch.save has written")
    assert not ran.exists()
    torch.load(save(path, {}, with_(config=Program(str(ran)))), weights_only=False)[
        "config"
    ].close()
    assert ran.exists()  # it would have


def test_a_file_cut_short_is_damaged(tmp_path):
    path = tmp_path / "ckpt.pt"
    save(path, random_weights())
    whole = path.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, tmp_path / "out", "ckpt.pt is damaged, or no file that torch.save has")


def test_a_file_that_would_grow_when_it_is_read_is_not_opened(tmp_path):
    path = tmp_path / "ckpt.pt"
    save(path, random_weights())
    with zipfile.ZipFile(path) as whole:
        parts = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small:
        for name, content in parts.items():
            more = b"\0" * 10**7 if name.endswith("data.pkl") else b""
            small.writestr(name, content + more)
    refused(path, tmp_path / "out", "ckpt.pt is damaged, or no file that torch.save has")


def test_a_tokenizer_beside_a_folder_that_has_its_own_is_not_ignored(tmp_path):
    (tmp_path / "in").mkdir()
    refused(tmp_path / "in", tmp_path / "out", "tokenizer='bytes' should be left out: a folder")
