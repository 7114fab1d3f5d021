"""Guessing changes the time and not the text; with a draft that samples, not its distribution."""

import collections
import copy
import itertools
import math
import random
from array import array
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import TINY
from test_model import make
from torch import nn

import sample
import speculate as module
from cache import KVCache
from engine import checkpoint, linear, opening, replay
from engine.inference import ready
from engine.linear import OneOrSeveral, PackedLinear, PlainLinear, packable
from engine.twin import twin
from engine.wider import wider
from generate import generate
from model import GPT
from pick import penalise, pick, probabilities
from shape import GPTConfig
from speculate import MOST, PAUSE, Draft, lookup, speculate

REPEATS = [1, 2, 3, 4, 5, 6, 1, 2, 3, 4]
OPTIONS = [
    dict(temperature=0),
    dict(temperature=0.7, top_k=9),
    dict(temperature=0.9, top_p=0.8, repetition_penalty=1.2, unused=[3, 5]),
]


def counted(monkeypatch) -> list[int]:
    """Will hold the number of tokens of every pass."""
    passes, read = [], module.read
    monkeypatch.setattr(
        module, "read", lambda m, tokens, c: passes.append(len(tokens)) or read(m, tokens, c)
    )
    return passes


@pytest.fixture
def trusted(monkeypatch):
    """Guesses may be as bad as they like."""
    monkeypatch.setattr(module.Trust, "number", lambda *_: MOST)


def wild(text, most, chances):
    """Certain of anything, mostly wrong: rejected positions of every number."""
    rng = random.Random(len(text))
    return [rng.choice(text[-4:]) for _ in range(min(most, rng.randrange(5)))], None


@pytest.mark.parametrize("guess", [lookup, wild])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", ["modern", "gpt2"])
def test_a_certain_guess_changes_no_token_even_when_sampled(
    shape, options, guess, monkeypatch, trusted
):
    """Far beyond the context, which is read anew when it is full."""
    model, passes = make(shape), counted(monkeypatch)
    for prompt in (REPEATS, [*range(40)]):
        expected = list(generate(model, prompt, 50, seed=4, **options))
        assert list(speculate(model, prompt, 50, guess, seed=4, **options)) == expected
    if guess is wild or options["temperature"] == 0:  # a random model repeats itself when greedy
        assert max(passes) > 1 and len(passes) < 95


@pytest.mark.parametrize("parts", ["recorded", "packed", "int8", "prefix"])
def test_the_cache_takes_back_what_was_refused_in_every_form(parts, monkeypatch, trusted):
    model = make("modern", **(dict(mask="prefix") if parts == "prefix" else {}))
    if parts == "recorded":
        monkeypatch.setattr(replay, "records", lambda *_: True)
    if parts != "prefix":
        model = ready(model, "int8" if parts == "int8" else "", several=True)
    markers = type("Markers", (), dict(assistant=60, end_of_text=59, user=58, end=57, system=56))
    more = dict(temperature=0.8, markers=markers if parts == "prefix" else None)
    prompt = [58, 9, 8, 9, 8, 57, 60] if parts == "prefix" else REPEATS
    expected = list(generate(model, prompt, 60, **more))
    assert list(speculate(model, prompt, 60, wild, **more)) == expected


def test_a_greedy_draft_changes_no_token_whatever_it_guesses(monkeypatch):
    model = make("llama")
    expected = list(generate(model, REPEATS, 70, temperature=0))
    for small in (make("llama"), make("gpt2", seed=5, block_size=11)):
        draft, passes = Draft(small, model), counted(monkeypatch)
        draft.cost = 0.1
        assert list(speculate(model, REPEATS, 70, draft, temperature=0)) == expected
        assert max(passes) > 1


# --- the distribution, against the exact one

PROMPT, LENGTH, VOCAB = [0, 1, 2, 0, 1, 2, 0, 1], 3, 5
TUNED = dict(temperature=0.9, top_p=0.97, repetition_penalty=1.1)


class Table:
    """A model of VOCAB tokens that looks at the last two: it takes no time."""

    def __init__(self, seed: int):
        rng = torch.Generator().manual_seed(seed)
        self.logits_of = 2 * torch.randn(VOCAB * VOCAB, VOCAB, generator=rng)
        self.config = GPTConfig(vocab_size=VOCAB, block_size=16, n_layer=1, n_head=1, n_embd=2)
        self.wte = torch.nn.Embedding(1, 1)

    def new_cache(self, size=0):
        return KVCache(self.config, 1, size=size)

    def trunk(self, tokens, mask=None, cache=None):
        """Keeps the tokens where keys would be; of each new one (1, T, 1) which pair it ends."""
        before, end = int(cache.lengths), int(cache.lengths) + tokens.size(1)
        stored = cache.k[0, 0, 0, :, 0]
        stored[before:end] = tokens[0].float()
        cache.lengths += tokens.size(1)
        earlier = torch.cat((stored[:1], stored))[before:end]  # the first has none
        return (stored[before:end] + VOCAB * earlier).long()[None]

    def logits(self, x):
        return self.logits_of[x]

    def __call__(self, tokens, cache):
        return self.logits(self.trunk(tokens, cache=cache))


def exact(model: Table) -> dict[tuple, float]:
    """The probability of every text of LENGTH tokens behind PROMPT."""
    found = {}
    for text in itertools.product(range(VOCAB), repeat=LENGTH):
        whole, p = [*PROMPT, *text], 1.0
        for i in range(len(PROMPT), len(whole)):
            row = model.logits_of[whole[i - 1] + VOCAB * whole[i - 2]][None]
            row = penalise(row, torch.tensor([whole[:i]]), TUNED["repetition_penalty"])
            p *= probabilities(row, TUNED["temperature"], 0, TUNED["top_p"])[0, whole[i]].item()
        found[text] = p
    assert math.isclose(sum(found.values()), 1)
    return found


def excess(kind: str, count: int) -> float:
    """By how many standard deviations chi-square is above its mean, for `count` texts."""
    model, small = Table(1), Table(2)
    p, texts = exact(model), collections.Counter()
    draft = Draft(small, model, seed=3)
    with patch.object(module.Trust, "number", lambda *_: 2):
        for seed in range(count):
            draft.cache.lengths.zero_()  # another text
            guess = draft if kind == "draft" else lookup
            steps = speculate(model, PROMPT, LENGTH, guess, seed=seed, **TUNED)
            texts[tuple(token for (token,) in steps)] += 1
    assert all(p[text] > 0 for text in texts)
    rare = [text for text in p if p[text] * count < 5]
    cells = [(p[text] * count, texts[text]) for text in p if text not in rare]
    cells.append((sum(p[t] for t in rare) * count, sum(texts[t] for t in rare)))
    freedom = len(cells) - 1
    return (sum((o - e) ** 2 / e for e, o in cells) - freedom) / math.sqrt(2 * freedom)


def without_residual(guesses, q, p, draw):
    """The rule, but for the tokens that replace refused ones: drawn from p."""
    for i, g in enumerate(guesses):
        if draw() * q[i, g] >= p[i, g]:
            return [*guesses[:i], module.drawn(p[i], draw())]
    return [*guesses, module.drawn(p[-1], draw())]


@pytest.mark.parametrize("kind", ["lookup", "draft"])
def test_what_is_sampled_has_the_exact_distribution(kind):
    assert excess(kind, 1200) < 3


def test_that_test_sees_a_missing_residual(monkeypatch):
    monkeypatch.setattr(module, "accept", without_residual)
    assert excess("draft", 1200) > 6


def test_probabilities_are_those_of_pick():
    logits = 2 * torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
    uniform = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    for options in (dict(temperature=0), dict(temperature=0.7), dict(top_k=3), dict(top_p=0.8)):
        counts = pick(logits.expand(10_000, 6), uniform, **options).bincount(minlength=6)
        p = probabilities(logits, **options)[0]
        torch.testing.assert_close(counts / 10_000, p.float(), atol=2e-4, rtol=0)


# --- guesses


def test_lookup_goes_on_where_the_longest_latest_match_did():
    def guess(text, most=MOST):
        return lookup(array("q", text), most)[0]

    assert guess([1, 2, 3, 9, 9, 1, 2, 3]) == [9, 9]  # three match: two are trusted
    assert guess([1, 2, 3, 7, 0, 2, 3, 8, 1, 2, 3]) == [7, 0]  # the longest
    assert guess([1, 2, 3, 7, 7, 1, 2, 3, 8, 9, 1, 2, 3]) == [8, 9]  # of equals the latest
    assert guess([5, 6] * 20) == [5, 6] * 7 + [5]  # the end goes round
    assert guess([5, 6] * 20, 3) == [5, 6, 5]
    for nothing in ([1], [1, 1], [1, 2, 3, 1, 2], [1, 2, 3, 4]):
        assert guess(nothing) == []


@pytest.mark.parametrize("cost", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("right", [False, True])
def test_guesses_that_fail_are_made_seldom_and_those_that_succeed_much(cost, right):
    trust, length, ks = module.Trust(cost), 10, []
    for _ in range(264):
        ks.append(trust.number(length))
        length += 1 + ks[-1] * right
        if ks[-1]:
            trust.saw(ks[-1], ks[-1] * right, length)
    assert (min(ks[200:]) == MOST) if right else (sum(ks[200:]) <= 2 and max(ks[200:]) == 1)
    assert ks[0] == {0.0: 2, 0.05: 2, 0.5: 1}[cost]


def test_guesses_that_are_right_again_soon_are_many():
    """Where a text at last begins to copy; a probe that was right is followed by another."""
    trust, length, passes = module.Trust(0.0), 0, 0
    for _ in range(50):
        length = max(length + 1, trust.pause)
        trust.saw(1, 0, length)
    while trust.number(length) < MOST and passes < 99:
        k = trust.number(length)
        length += 1 + k
        passes += 1
        if k:
            trust.saw(k, k, length)
    assert passes <= PAUSE + 15


def test_guesses_behind_a_wrong_one_say_nothing():
    trust = module.Trust(0.0)
    for _ in range(100):
        trust.saw(15, 7, 0)
    assert trust.right / trust.tried == pytest.approx(7 / 8)


def test_where_each_position_costs_the_same_fewer_are_guessed():
    free, dear = module.Trust(0.0), module.Trust(0.0, math.inf)
    free.right = dear.right = 0.9 * free.tried
    assert free.number(0) == MOST and 1 <= dear.number(0) <= 5
    plain, quantized = (ready(make("modern"), kind) for kind in ("", "int8"))
    assert not hasattr(plain, "all_more") and quantized.all_more == math.inf


def test_wrong_guesses_end_soon(monkeypatch):
    """Where nothing that repeats itself goes on as before, a text costs a pass a token."""

    def wrong(text, most, *_):
        return [60] * most, None

    def pick(logits, uniform):
        return torch.ones(len(logits), dtype=torch.long)

    passes = counted(monkeypatch)
    list(speculate(make("modern"), [1, 2], 70, wrong, pick=pick))
    guesses = [n - 1 for n in passes]
    assert guesses[0] == 2 and sum(guesses) <= 10 and max(guesses[10:]) == 1


# --- the command, and Python


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    import train

    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.py").write_text("")
    for name, layers in (("run", 2), ("small", 1)):
        argv = [str(folder / "tiny.py"), f"--data={data}", f"--out={folder / name}", *TINY]
        assert train.main([*argv, f"--n_layer={layers}"]) == 0
    return folder / "run"


def test_the_command_writes_the_same_sooner(run, capsys, tmp_path):
    def text(*argv):
        sample.main([str(run), "--dtype=float32", "--max_tokens=70", *argv])
        return capsys.readouterr()

    often = "--prompt=" + "the model reads. " * 3
    for how in (["--temperature=0"], ["--temperature=0.6", "--stop=s."], ["--top_k=5", "--seed=0"]):
        expected = text(often, *how)
        assert text(often, *how, "--speculate=lookup") == expected
    assert text(often, "--temperature=0").out == (
        text(often, "--temperature=0", f"--speculate={run.parent / 'small'}").out
    )
    several = text(often, "--num_samples=2", "--speculate=lookup")
    assert "speculate serves one sample: these 2 are written side by side\n" in several.err
    assert several.out == text(often, "--num_samples=2").out
    with pytest.raises(ValueError, match="speculate='lookup' should be left out with --beam"):
        text("--beam=2", "--speculate=lookup")


def test_a_draft_with_another_tokenizer_is_refused(run):
    here, other = checkpoint.load_model(str(run))[1], SimpleNamespace(extends=lambda other: False)
    s = sample.Settings(str(run), speculate=str(run.parent / "small"))
    assert opening.load_draft(checkpoint.find(s.speculate), here, s)
    with pytest.raises(ValueError, match="speculate=.*should be lookup, or a run with the very"):
        opening.load_draft(checkpoint.find(s.speculate), other, s)


def test_generate_from_python_is_fast_and_leaves_the_model_as_it_is(run):
    model, tokenizer = sample.load_model(str(run))
    prompt, before = tokenizer.encode("the model "), copy.deepcopy(model.state_dict())
    threads = torch.get_num_threads()

    def both(**options):
        book = list(generate(model, prompt, 50, **options))
        fast = list(sample.generate(model, prompt, 50, dtype="float32", **options))
        assert fast == book

    both(num_samples=2)
    both(seed=3)
    assert next(iter(sample.generate(model, prompt, 1))) and torch.get_num_threads() == threads
    ready, _ = twin(model, 1, "float32")
    assert ready is twin(model, 1, "float32")[0] is not model
    assert not any(isinstance(m, nn.Linear) for m in ready.modules())
    assert ready.wte.weight.data_ptr() == model.wte.weight.data_ptr()
    assert type(model) is GPT and model(torch.tensor([prompt])).shape[1] == len(prompt)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    optimizer = torch.optim.AdamW(model.parameters(), 0.02, fused=True)
    model(torch.tensor([prompt]), torch.tensor([prompt])).backward()
    optimizer.step()  # which tells no version of the weights
    both(seed=3)  # what was learned since counts
    model.blocks[0].mlp.register_forward_hook(lambda module, given, y: 2 * y)
    both(seed=3)
    greedy = dict(temperature=0, dtype="float32")
    plain = list(sample.generate(model, prompt, 50, **greedy))
    for guess in ("lookup", sample.load_model(str(run.parent / "small"))[0]):
        assert list(sample.generate(model, prompt, 50, speculate=guess, **greedy)) == plain
    for guess, mistake in (
        ("Lookup", "'lookup'"),
        (GPT(GPTConfig(vocab_size=60)), "same tokenizer"),
    ):
        with pytest.raises(ValueError, match=mistake):
            next(sample.generate(model, prompt, 5, speculate=guess))
    with pytest.raises(ValueError, match="num_samples=2"):
        next(sample.generate(model, prompt, 5, num_samples=2, speculate="lookup"))


def test_a_wider_model_computes_the_same(run):
    biased = make("modern", vocab_size=257, qkv_bias=True)
    for name, p in biased.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    for small, error in ((checkpoint.load_model(str(run))[0], 1e-4), (biased, 1e-3)):
        large, x = wider(small, 4, 64, 300), torch.randint(257, (2, 20))
        y = large(x)
        assert y.shape == (2, 20, 300) and large.num_parameters() > 3 * small.num_parameters()
        # where states are small, the epsilon of norms counts for more in the wider ones
        torch.testing.assert_close(y[..., :257], small(x), atol=error, rtol=1e-4)
    with pytest.raises(ValueError, match="default shape"):
        wider(make("gpt2"), 4, 64, 300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_for_one_and_several_has_a_form_for_each(dtype, monkeypatch):
    monkeypatch.setattr(linear, "forms", lambda *_: {"plain": PlainLinear})
    choose = OneOrSeveral(dtype, [])
    plain = nn.Linear(1024, 513, dtype=dtype)
    layer = choose(plain.weight, plain.bias)
    with torch.inference_mode():
        for rows in (1, 3):
            x = torch.randn(1, rows, 1024, dtype=dtype)
            error = 0.02 if dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(layer(x), plain(x), atol=error, rtol=error)
    if packable(torch.float32):
        assert isinstance(layer.one, PlainLinear) and isinstance(layer.several, PackedLinear)
    assert isinstance(choose(torch.ones(4, 4, dtype=dtype), None), PlainLinear)
