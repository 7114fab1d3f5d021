"""Generating: cached, seeded, with a pick that can be replaced, streamed in whole characters."""

import collections
import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import generate as module
from dataset import layout
from engine.inference import ready
from generate import TextStream, answers, beam, generate
from model import GPT, GPTConfig
from pick import AHEAD, FIRST, penalise, pick, probabilities, uniform_numbers
from tokenizer import bytes_tokenizer


def make_model(block_size: int = 16, **more) -> GPT:
    shape = dict(vocab_size=257, block_size=block_size, n_layer=2, n_embd=32, zero_init=False)
    model = GPT(GPTConfig(**(shape | more)))
    model.init_weights(3)
    with torch.no_grad():
        model.head.weight.mul_(20)
    return model.eval()


def greedy_uncached(model: GPT, prompt: list[int], count: int) -> list[int]:
    """What generate should do at temperature 0, without a cache."""
    limit = model.config.block_size
    context, out = prompt[-limit:], []
    for _ in range(count):
        if len(context) > limit:  # full: its last half is read anew
            context = context[-(limit // 2) :]
        out.append(model(torch.tensor([context]))[0, -1].argmax().item())
        context.append(out[-1])
    return out


@pytest.mark.parametrize("prompt", [[256], list(range(5)), list(range(16)), list(range(40))])
def test_cached_text_equals_uncached_text_beyond_the_context(prompt):
    model = make_model()
    cached = [token for (token,) in generate(model, prompt, 60, temperature=0)]
    assert cached == greedy_uncached(model, prompt, 60)
    assert len(set(cached)) > 5


def test_every_token_passes_the_model_once_until_the_context_is_full():
    model, passed = make_model(), []
    model.wte.register_forward_pre_hook(lambda _, args: passed.append(tuple(args[0].shape)))
    assert len(list(generate(model, [1, 2, 3, 4], 15, num_samples=2))) == 15
    prompt, one, half = (1, 4), (2, 1), (2, 8)
    assert passed == [prompt, *[one] * 12, half, one]  # the last token picked needs no pass


def test_same_seed_same_tokens_whatever_the_number_of_samples():
    model = make_model()

    def run(n, seed):
        return list(zip(*generate(model, [5, 6], 40, num_samples=n, seed=seed), strict=True))

    three = run(3, seed=0)
    assert three == run(3, seed=0)
    assert run(1, seed=0)[0] == three[0]
    assert len({three[0], three[1], three[2], run(1, seed=1)[0]}) == 4


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="no token"):
        next(generate(make_model(), [], 3))


# --- pick


def test_pick_follows_the_distribution():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, 4)
    uniform = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000

    def shares(**settings):
        counts = collections.Counter(pick(logits, uniform, **settings).tolist())
        return [round(counts[i] / 4000, 3) for i in range(4)]

    assert shares() == [0.5, 0.3, 0.15, 0.05]
    assert shares(top_k=2) == [0.625, 0.375, 0, 0]
    assert shares(top_k=99) == shares()
    assert shares(top_p=0.6) == [0.625, 0.375, 0, 0]  # the smallest set that reaches 0.6
    assert shares(top_p=1e-9) == [1, 0, 0, 0]
    assert shares(top_k=2, top_p=0.6) == [1, 0, 0, 0]  # of the two that are left, one has 0.625
    assert shares(temperature=0) == shares(temperature=1e-30) == [1, 0, 0, 0]
    assert shares(temperature=1e-6) == [1, 0, 0, 0]
    halves = torch.zeros(2, 2)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert len(set(pick(halves, ends, top_p=0.5).tolist())) == 1  # one half reaches 0.5
    assert shares(temperature=0.5)[0] == pytest.approx(0.25 / 0.365, abs=1e-3)


def test_each_row_is_picked_by_its_own_number_and_its_own_ranking():
    logits = torch.tensor([[0.1, 0.7, 0.2], [0.2, 0.1, 0.7]]).log()
    for settings in ({}, {"top_k": 2}, {"top_p": 0.95}):
        first = pick(logits, torch.tensor([0.3, 0.0], dtype=torch.float64), **settings)
        assert first.tolist() == [1, 0 if not settings else 2]


def test_the_numbers_of_a_sample_are_its_own_and_never_begin_again():
    numbers = torch.stack([*itertools.islice(uniform_numbers(seed=7, count=3), 2 * AHEAD + 1)])
    for i in range(3):
        draw = random.Random(f"7 {i}")  # as an answer's, see `to_answer`
        assert numbers[:, i].tolist() == [draw.random() for _ in range(2 * AHEAD + 1)]


def test_a_token_of_no_probability_is_never_picked():
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, 4)
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert pick(logits, uniform).tolist() == [0, 2, 2]
    assert set(pick(logits, uniform, top_p=0.999).tolist()) <= {0, 2}


def test_top_p_is_the_fewest_tokens_however_many_these_are():
    """By definition, in rows of which one has its nucleus in two tokens, one in most of 12,000."""
    noise = torch.randn(3, 12_000, generator=torch.Generator().manual_seed(0))
    logits = noise * torch.tensor([[30.0], [2.0], [0.1]])
    p = probabilities(logits, top_p=0.9)
    kept = []
    for row, found in zip(logits.softmax(dim=-1).double(), p, strict=True):
        order = row.argsort(descending=True, stable=True)
        before = row[order].cumsum(dim=0) - row[order]  # what the likelier ones have
        nucleus = order[before < 0.9]
        wanted = torch.zeros_like(row).index_copy(0, nucleus, row[nucleus] / row[nucleus].sum())
        assert torch.allclose(found, wanted, atol=1e-9)
        kept.append(len(nucleus))
    assert kept[0] < FIRST < kept[1] < 8 * FIRST < kept[2]


def test_rare_tokens_of_a_large_vocabulary_keep_their_share():
    """200,000 tokens have a thousandth among them: in float32 a dozen share each possible sum."""
    rare = 200_000
    logits = torch.full((1, rare + 1), 1e-3 / rare).log()
    logits[0, 0] = torch.tensor(1 - 1e-3).log()
    for settings in ({}, {"top_p": 1 - 1e-9}):
        numbers = [0.9995 + i * 1e-3 / rare for i in range(20)]
        picked = {
            pick(logits, torch.tensor([number], dtype=torch.float64), **settings).item()
            for number in numbers
        }
        assert len(picked) >= 19


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="float32"):
        pick(torch.tensor([[0.0, torch.nan]]), torch.zeros(1, dtype=torch.float64))


class OtherDevice(TorchDispatchMode):
    """Plays a device without float64, such as Apple's, whose sums have no fixed order, as CUDA's.

    Its tensors are those of "meta"; what is copied to the CPU arrives as numbers.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = args and isinstance(args[0], torch.Tensor) and args[0].is_meta
        if leaves and torch.device(kwargs.get("device") or "meta").type == "cpu":
            return torch.full(args[0].shape, 0.1, dtype=kwargs.get("dtype") or args[0].dtype)
        result = function(*args, **kwargs)
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                assert tensor.dtype != torch.float64, f"{function} makes float64"
                assert "cumsum" not in str(function), "sums on this device"
        return result


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5}]
)
def test_no_device_but_the_cpu_is_asked_for_float64(settings):
    uniform = torch.zeros(2, dtype=torch.float64)
    logits = torch.zeros(2, 9, device="meta")
    with OtherDevice():
        tokens = pick(logits, uniform, **settings)
    assert tokens.shape == (2,) and tokens.is_meta and tokens.dtype == torch.int64


def test_a_pick_of_your_own_takes_the_place_of_ours():
    seen = []

    def second_best(logits, uniform, note):
        seen.append((tuple(logits.shape), tuple(uniform.shape), note))
        return logits.topk(2)[1][:, 1]

    model = make_model()
    tokens = list(generate(model, [1, 2], 3, num_samples=2, pick=second_best, note="here"))
    assert seen == [((2, 257), (2,), "here")] * 3
    assert tokens[0] == [model(torch.tensor([[1, 2]]))[0, -1].topk(2)[1][1]] * 2


@pytest.mark.parametrize("temperature", [0, 5])
def test_unused_ids_are_never_picked(temperature):
    model = make_model()
    with torch.no_grad():
        model.head.weight[250:] *= 30  # these would be picked all the time
    for unused in ((), range(250, 257)):
        steps = generate(model, [1], 50, num_samples=4, temperature=temperature, unused=unused)
        picked = {token for tokens in steps for token in tokens}
        assert picked.isdisjoint(range(250, 257)) == bool(unused)


def test_a_repetition_penalty_makes_what_was_there_less_likely():
    logits = torch.tensor([[2.0, -2.0, 3.0, -3.0]])
    penalised = penalise(logits, torch.tensor([[0, 1, 0]]), 2.0)
    assert penalised.tolist() == [[1.0, -4.0, 3.0, -3.0]]
    transformers = pytest.importorskip("transformers")
    context = torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.2)(context, logits)
    assert torch.equal(penalise(logits, context, 1.2), theirs)


def test_a_repetition_penalty_counts_prompt_and_answer_and_1_is_off():
    model = make_model(block_size=128)

    def greedy(**more):
        return [token for (token,) in generate(model, [7, 8], 60, temperature=0, **more)]

    assert greedy(repetition_penalty=1.0) == greedy()
    assert len(set(greedy())) < 60
    once = greedy(repetition_penalty=1e6)  # logits here are of both signs
    assert len({7, 8, *once}) == 62


# --- many prompts


ENDS = range(200, 257)  # with so many, answers end soon


def reader(ends=ENDS, markers=None, unused=()) -> SimpleNamespace:
    """All that `answers` asks of a tokenizer."""
    return SimpleNamespace(ends=list(ends), unused=list(unused), markers=markers)


def some_prompts(count: int = 11, longest: int = 14) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(200) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def greedy_answer(model: GPT, prompt: list[int], most: int, ends=ENDS) -> list[int]:
    """What `answers` should do at temperature 0, without a cache."""
    context = prompt[-model.config.block_size :]
    tokens = []
    while len(tokens) < most and len(context) <= model.config.block_size:
        new = model(torch.tensor([context]))[0, -1].argmax().item()
        if new in ends:
            break
        tokens.append(new)
        context = [*context, new]
    return tokens


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("slots", [1, 3, 32])
def test_answers_side_by_side_are_those_that_each_prompt_gets_alone(slots, fast):
    model = make_model(block_size=24)
    expected = {i: greedy_answer(model, p, 9) for i, p in enumerate(some_prompts())}
    if fast:
        model = ready(model, rows=slots)
    found = list(answers(model, reader(), some_prompts(), 9, slots=slots, temperature=0))
    assert sorted(number for number, _ in found) == list(range(11))
    assert dict(found) == expected
    assert len({len(answer) for answer in expected.values()}) > 3  # they end at different times


def test_a_prompt_is_read_once_for_all_of_its_answers(monkeypatch):
    model, read, prefill = make_model(block_size=24), [], module.prefill
    expected = [greedy_answer(model, prompt, 9) for prompt in ([1, 2], [3, 4, 5], [6])]

    def noted(model, texts, *rest):
        read.append(texts)
        return prefill(model, texts, *rest)

    monkeypatch.setattr(module, "prefill", noted)
    prompts = [[1, 2], [3, 4, 5], [1, 2], [6], [3, 4, 5], [1, 2]]
    found = dict(answers(model, reader(), prompts, 9, slots=6, temperature=0))
    assert [found[i] for i in (0, 2, 5, 1, 4, 3)] == [expected[i] for i in (0, 0, 0, 1, 1, 2)]
    assert read == [[[6], [1, 2], [3, 4, 5]]]


def test_answer_i_draws_from_seed_and_i_whatever_the_number_of_slots():
    model, prompts = make_model(block_size=64), some_prompts()

    def run(slots, seed=0):
        return dict(answers(model, reader(), prompts, 20, slots=slots, seed=seed))

    assert run(1) == run(2) == run(7) == run(50)
    assert run(1) != run(1, seed=1)
    # sample i of `generate` has the same random numbers
    samples = zip(*generate(model, [1, 2], 20, num_samples=5), strict=True)
    ended = [list(itertools.takewhile(lambda t: t not in ENDS, sample)) for sample in samples]
    found = dict(answers(model, reader(), [[1, 2]] * 5, 20, slots=3))
    assert [found[i] for i in range(5)] == ended


def test_an_answer_draws_from_its_key_wherever_its_prompt_stands_and_may_keep_its_end():
    model, prompts = make_model(block_size=64), some_prompts()
    keys = [(7, i) for i in range(len(prompts))]
    forwards = dict(answers(model, reader(), prompts, 20, keys=keys))
    turned = dict(answers(model, reader(), prompts[::-1], 20, keys=keys[::-1]))
    assert [turned[i] for i in sorted(turned)][::-1] == [forwards[i] for i in sorted(forwards)]
    assert forwards != dict(answers(model, reader(), prompts, 20))
    with_end = dict(answers(model, reader(), prompts, 20, keys=keys, with_end=True))
    ended = [i for i in forwards if len(with_end[i]) == len(forwards[i]) + 1]
    assert ended and all(with_end[i][-1] in ENDS for i in ended)
    assert all(with_end[i][: len(ids)] == ids for i, ids in forwards.items())


def logits_of(model: GPT, prompts, monkeypatch, **how) -> dict[tuple, torch.Tensor]:
    """The logits by which `answers` chooses: (prompt, answer so far) to (V)."""
    seen, now = {}, []

    class Watched(module.Slots):
        def __init__(self, *given):
            super().__init__(*given)
            now[:] = [self]

    def greedy(logits, uniform):
        for row, answer in enumerate(now[0].writing):
            seen[tuple(answer.prompt), tuple(answer.tokens)] = logits[row].clone()
        return logits.argmax(dim=-1)

    with monkeypatch.context() as patch:
        patch.setattr(module, "Slots", Watched)
        list(answers(model, reader(), prompts, 9, pick=greedy, **how))
    return seen


@pytest.mark.parametrize("exact", [True, False])
def test_beside_neighbours_logits_are_those_that_a_prompt_has_alone(exact, monkeypatch):
    model, prompts = make_model(block_size=24), some_prompts()
    how = dict(slots=4, exact=exact)
    beside = logits_of(model, prompts, monkeypatch, **how)
    assert len(beside) > 30
    for prompt in prompts:
        for place, logits in logits_of(model, [prompt], monkeypatch, **how).items():
            torch.testing.assert_close(logits, beside[place], atol=1e-4, rtol=0)
            assert torch.equal(logits, beside[place]) or not exact


def test_memory_is_bounded_by_the_slots(monkeypatch):
    model, taken, rows = make_model(), [], []
    new_cache = GPT.new_cache
    monkeypatch.setattr(GPT, "new_cache", lambda *a, **k: rows.append(a[1]) or new_cache(*a, **k))
    prompts = (taken.append(i) or [i % 200] for i in range(40))
    for done, _ in enumerate(answers(model, reader(), prompts, 6, slots=4), start=1):
        assert len(taken) <= done + 4
    assert done == 40 and max(rows) == 4


def test_an_answer_ends_where_the_context_is_full_and_a_long_prompt_is_cut():
    model = make_model(block_size=16)
    prompts = [[7] * 3, [8] * 15, [9] * 16, list(range(40))]
    found = dict(answers(model, reader(ends=()), prompts, 99, temperature=0))
    assert [len(found[i]) for i in range(4)] == [14, 2, 1, 1]
    assert found[3] == greedy_answer(model, prompts[3], 99, ends=())
    assert len(dict(answers(model, reader(ends=()), prompts, 2))[0]) == 2
    with pytest.raises(ValueError, match="no token"):
        list(answers(model, reader(), [[1], []], 3))
    assert list(answers(model, reader(), [], 3)) == []


def test_what_a_tokenizer_does_not_use_is_in_no_answer():
    model = make_model()
    tokenizer = reader(ends=(), unused=range(100, 257))
    found = dict(answers(model, tokenizer, some_prompts(), 9, temperature=5))
    assert max(max(answer) for answer in found.values()) < 100
    assert max(beam(model, tokenizer, [1, 2], 9)) < 100


def test_a_prompt_that_sees_itself_whole_is_read_so():
    tokenizer = bytes_tokenizer().extended([])
    shape = dict(vocab_size=tokenizer.vocab_size, logit_cap=0.0, n_head=2)
    model = make_model(block_size=32, mask="prefix", **shape)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10)  # so that what is seen shows
    rows = [[dict(role="user", content="one, two, three"[: 2 * n])] for n in range(1, 9)]
    prompts = [tokenizer.encode_row(row, open=True) for row in rows]
    found = dict(answers(model, tokenizer, prompts, 6, slots=3, temperature=0))
    for i, prompt in enumerate(prompts):
        context = list(prompt)
        for new in found[i]:
            x = torch.tensor([context])
            positions, mask = layout(x.numpy(), tokenizer.markers, "prefix")
            mask = torch.from_numpy(mask)
            logits = model(x, mask=mask, positions=torch.from_numpy(positions))[0, -1]
            assert logits.argmax().item() == new
            context.append(new)
        steps = generate(model, prompt, 6, temperature=0, markers=tokenizer.markers)
        alone = [token for (token,) in steps]
        assert alone[: len(found[i])] == found[i]
        assert beam(model, tokenizer, prompt, 6, width=1) == found[i]
    assert sum(map(len, found.values())) > 10
    model.config.mask = "causal"
    assert dict(answers(model, tokenizer, prompts, 6, temperature=0)) != found


def test_a_model_that_cannot_write_says_so():
    encoder = make_model(mask="full")
    with pytest.raises(ValueError, match="mask='full' makes an encoder"):
        next(generate(encoder, [1], 3))
    with pytest.raises(ValueError, match="mask='full' makes an encoder"):
        next(answers(encoder, reader(), [[1]], 3))


def test_running_text_is_causal_under_prefix_too():
    markers = bytes_tokenizer().extended([]).markers
    plain = list(generate(make_model(), [1, 2, 3], 20, temperature=0))
    for given in (None, markers):
        model = make_model(mask="prefix")
        assert list(generate(model, [1, 2, 3], 20, temperature=0, markers=given)) == plain


# --- beam search


def best_of_all(model: GPT, prompt: list[int], most: int, ends, penalty: float) -> list[int]:
    """The best answer of all there are, by asking for each."""
    scored = []
    for n in range(1, most + 1):
        texts = torch.tensor([*itertools.product(range(model.config.vocab_size), repeat=n)])
        x = torch.cat([torch.tensor([prompt]).expand(len(texts), -1), texts], dim=1)
        ln_p = model(x).log_softmax(dim=-1)[:, len(prompt) - 1 : -1]
        scores = ln_p.gather(-1, texts[..., None]).sum(dim=(1, 2)).tolist()
        for text, score in zip(texts.tolist(), scores, strict=True):
            if any(t in ends for t in text[:-1]) or (n < most and text[-1] not in ends):
                continue
            answer = text if text[-1] not in ends else text[:-1]
            scored.append((score / ((5 + n) / 6) ** penalty, answer))
    return max(scored)[1]


@pytest.mark.parametrize("penalty", [0.0, 0.6, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_beam_as_wide_as_all_there_is_finds_the_best_answer(seed, penalty):
    model = make_model(vocab_size=5, logit_cap=0.0, n_head=2)
    model.init_weights(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10)  # so that all that was said counts
    tokenizer = reader(ends=[4])
    found = beam(model, tokenizer, [0, 1], 4, width=5**4, length_penalty=penalty)
    assert found == best_of_all(model, [0, 1], 4, [4], penalty)


def test_a_length_penalty_makes_longer_answers_win():
    model = make_model(vocab_size=5)
    lengths = [
        len(beam(model, reader(ends=[4]), [0, 1], 4, width=5**4, length_penalty=penalty))
        for penalty in (-3.0, 9.0)
    ]
    assert lengths[0] < lengths[1]


@pytest.mark.parametrize("prompt", some_prompts(6))
def test_a_beam_of_one_is_greedy(prompt):
    model = make_model(block_size=24)
    assert beam(model, reader(), prompt, 9, width=1) == greedy_answer(model, prompt, 9)
    everything = greedy_answer(model, prompt, 99, ends=())
    assert beam(model, reader(ends=()), prompt, 99, width=1) == everything  # to the context's end


def test_a_wider_beam_finds_what_greedy_misses():
    """0 is likelier than 1, so greedy takes it; but only behind 1 comes something likely, 2."""
    table = torch.full((4, 4), 1e-9)
    table[3] = torch.tensor([0.6, 0.4, 1e-9, 1e-9])
    table[0] = torch.tensor([0.25, 0.25, 0.25, 0.25])
    table[1] = torch.tensor([0.01, 0.01, 0.97, 0.01])

    class Table(GPT):
        def logits(self, x):
            return x

    shape = dict(vocab_size=4, n_embd=4, n_head=1, n_layer=1, embed_norm=False, norm_weight=True)
    model = make_model(block_size=8, **(shape | dict(position="learned", qk_norm=False)))
    model = Table(model.config)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.wte.weight.copy_(table.log())
        model.norm = torch.nn.Identity()
    model.eval()
    assert beam(model, reader(ends=()), [3], 2, width=1)[0] == 0
    assert beam(model, reader(ends=()), [3], 2, width=2) == [1, 2]


# --- TextStream


def test_streaming_never_cuts_a_character():
    text = "naïve 文字 👩‍👩‍👧 ok"
    stream = TextStream(bytes_tokenizer())
    parts = [stream.feed(token) for token in text.encode()]
    assert "".join(parts) + stream.end() == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(parts)


def test_an_unfinished_character_at_the_end_is_shown_as_such():
    stream = TextStream(bytes_tokenizer())
    parts = [stream.feed(token) for token in "文".encode()[:2]]
    assert parts == ["", ""] and stream.end() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    "text, stop, shown, by",
    [
        ("AAAB tail", ["AAB"], "A", "AAB"),
        ("one two", ["two"], "one ", "two"),
        ("one tw", ["two"], "one tw", ""),
        ("ababac", ["abac"], "ab", "abac"),
        ("x END y STOP", ["STOP", "END"], "x ", "END"),
        ("aXY", ["XYZ", "Y"], "aX", "Y"),
        ("文字文", ["字"], "文", "字"),
        ("plain", [], "plain", ""),
    ],
)
def test_stop_strings(text, stop, shown, by):
    stream = TextStream(bytes_tokenizer(), tuple(stop))
    parts = [stream.feed(token) for token in text.encode()]
    assert "".join(parts) + stream.end() == shown
    assert stream.stopped_by == by
    assert stream.feed(65) == ""


def test_of_two_stop_strings_in_one_token_the_earlier_counts():
    words = {1: b"first LATE", 2: b"-", 3: b"EARLY and LATE"}
    tokenizer = SimpleNamespace(ends=[0], decode_bytes=lambda ids: words[ids[0]])
    stream = TextStream(tokenizer, ("LATE", "EARLY"))
    assert stream.feed(2) + stream.feed(3) == "-"
    assert stream.stopped_by == "EARLY"


def test_end_of_text_ends_a_sample():
    stream = TextStream(bytes_tokenizer(), ("ZZ",))
    assert stream.feed(65) + stream.feed(90) + stream.feed(256) == "AZ"
    assert stream.done and stream.feed(65) == "" and stream.end() == ""
    assert stream.stopped_by == ""


def test_each_of_several_end_tokens_ends_a_sample():
    plain = bytes_tokenizer()
    tokenizer = SimpleNamespace(ends=[256, 10], decode_bytes=plain.decode_bytes)
    for end in (256, 10):
        stream = TextStream(tokenizer)
        assert stream.feed(65) + stream.feed(end) == "A" and stream.done
