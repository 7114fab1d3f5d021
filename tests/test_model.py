"""The model: causal, exactly initialised, able to learn, and the same with and without a cache."""

import math
from typing import get_args, get_type_hints

import pytest
import torch

from engine.adopt import set_context
from model import GPT, IGNORE, GPTConfig, KVCache, rotary, rotate

GPT2 = dict(position="learned", norm="layer", norm_weight=True, norm_eps=1e-5, embed_norm=False)
GPT2 |= dict(qk_norm=False, mlp="gelu", bias=True, tied=True, logit_cap=0)
LLAMA = dict(norm_weight=True, embed_norm=False, qk_norm=False, mlp="swiglu", logit_cap=0)
LLAMA |= dict(n_kv_head=2)
SHAPES = {
    "modern": {},
    "grouped": dict(n_kv_head=2, head_dim=10, qkv_bias=True),
    "gpt2": GPT2,
    "llama": LLAMA,
}
SHAPES["qwen3"] = LLAMA | dict(qk_norm=True, tied=True)
SHAPES["qwen2"] = LLAMA | dict(qkv_bias=True, rope_factor=8.0, rope_original=8)
SHAPES["canon"] = dict(canon=4)
# and a bend that someone has added to shape.py
BENDS = get_args(get_type_hints(GPTConfig)["mlp"])
SHAPES |= {mlp: dict(mlp=mlp) for mlp in BENDS if mlp not in ("relu2", "gelu", "swiglu")}


def make(shape: str, seed: int = 0, zero_init: bool = False, **more) -> GPT:
    config = dict(vocab_size=61, block_size=24, n_layer=3, n_head=4, n_embd=32) | SHAPES[shape]
    model = GPT(GPTConfig(**(config | more), zero_init=zero_init))
    model.init_weights(seed)
    if not zero_init:  # larger than GPT-2's N(0, 0.02), so that differences would show
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(5) if p.ndim > 1 else p.add_(0.1)
    return model.eval()


def tokens(batch: int = 3, length: int = 24, vocab: int = 61) -> torch.Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_later_token_never_changes_an_earlier_logit(shape):
    model, x = make(shape), tokens()
    before = model(x)
    x[:, 13] = (x[:, 13] + 1) % 61
    after = model(x)
    assert torch.equal(before[:, :13], after[:, :13])
    assert not torch.equal(before[:, 13:], after[:, 13:])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pieces", [[1] * 24, [5, 1, 1, 7, 10], [24]])
def test_cached_decoding_equals_uncached(shape, pieces):
    model, x = make(shape), tokens()
    whole = model(x)
    cache = KVCache(model.config, batch=3)
    found = [model(piece, cache=cache) for piece in x.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(found, dim=1), whole, atol=1e-4, rtol=1e-4)


def read_into(cache: KVCache, row: int, model: GPT, text: torch.Tensor, pieces=()) -> None:
    """Prefills one text (T), whole or in pieces, and moves it into a slot."""
    fresh = model.new_cache(size=len(text))
    for piece in text.split(list(pieces) or len(text)):
        model(piece[None], cache=fresh)
    cache.put([row], fresh)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_cached_decoding_equals_uncached_for_rows_of_different_lengths(shape, whole):
    model, x = make(shape), tokens()
    expected = model(x)
    cache, lengths = model.new_cache(3, whole=whole), [3, 11, 1]
    for row, length in enumerate(lengths):
        read_into(cache, row, model, x[row, :length])
    for T in (1, 1, 4, 1):
        piece = torch.stack([row[n : n + T] for row, n in zip(x, lengths, strict=True)])
        logits = model(piece, cache=cache)
        for row, n in enumerate(lengths):
            torch.testing.assert_close(logits[row], expected[row, n : n + T], atol=1e-4, rtol=1e-4)
        lengths = [n + T for n in lengths]
    assert cache.lengths.tolist() == lengths


@pytest.mark.parametrize("pieces", [[], [4, 1, 3]])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_text_moves_into_a_slot_while_the_others_go_on(shape, pieces):
    """Whatever stood in the slot before; the text may be read in pieces."""
    model, x = make(shape), tokens()
    expected = model(x)
    cache = model.new_cache(3)
    model(x[:, :9], cache=cache)
    read_into(cache, 1, model, x[0, :8], pieces)  # where nine tokens stood
    logits = model(torch.stack((x[0, 9:10], x[0, 8:9], x[2, 9:10])), cache=cache)[:, 0]
    wanted = torch.stack((expected[0, 9], expected[0, 8], expected[2, 9]))
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


def test_several_texts_move_in_together_and_each_keeps_its_length():
    model, x = make("modern"), tokens()
    expected = model(x)
    fresh, cache = model.new_cache(2, size=7), model.new_cache(3)
    for row, length in enumerate((3, 7)):
        read_into(fresh, row, model, x[row, :length])
    cache.put([2, 0], fresh)
    assert cache.lengths.tolist() == [7, 0, 3]
    logits = model(torch.stack((x[1, 7:8], x[2, :1], x[0, 3:4])), cache=cache)[:, 0]
    wanted = torch.stack((expected[1, 7], expected[2, 0], expected[0, 3]))
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


def test_rows_can_be_repeated_dropped_and_put_in_another_order():
    model, x = make("modern"), tokens()
    expected = model(x)
    cache = model.new_cache(3)
    for row, length in enumerate((5, 8, 2)):
        read_into(cache, row, model, x[row, :length])
    cache.take([2, 0, 0, 2])
    assert cache.lengths.tolist() == [2, 5, 5, 2]
    logits = model(torch.stack((x[2, 2:3], x[0, 5:6], x[0, 5:6], x[2, 2:3])), cache=cache)[:, 0]
    wanted = torch.stack((expected[2, 2], expected[0, 5], expected[0, 5], expected[2, 2]))
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_neighbours_change_nothing_at_all_where_attention_spans_the_whole_cache(shape):
    model, x = make(shape), tokens()
    found = []
    for lengths in ((0, 6, 0), (6, 6, 6), (17, 6, 2)):
        cache = model.new_cache(3, whole=True)
        for row, length in enumerate(lengths):
            if length:
                read_into(cache, row, model, x[row, :length])
        found.append(model(x[:, 6:7], cache=cache)[1])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_cache_refuses_what_does_not_fit():
    model = make("modern")
    cache = KVCache(model.config, batch=1)
    model(tokens(1), cache=cache)
    with pytest.raises(ValueError, match="25 positions do not fit in a KV cache of 24"):
        model(tokens(1, 1), cache=cache)
    with pytest.raises(ValueError, match="block_size=24"):
        model(tokens(1, 25))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_mask_is_an_argument(shape):
    model, x = make(shape), tokens()
    causal = torch.ones(24, 24, dtype=torch.bool).tril()
    torch.testing.assert_close(model(x, mask=causal), model(x), atol=1e-4, rtol=1e-4)
    everything = torch.ones(24, 24, dtype=torch.bool)
    y = x.clone()
    y[:, 20] = (y[:, 20] + 1) % 61
    assert not torch.allclose(model(x, mask=everything)[:, 3], model(y, mask=everything)[:, 3])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("zero_init", [True, False])
def test_loss_at_initialisation_is_ln_V(shape, zero_init):
    config = dict(vocab_size=500, block_size=64, n_layer=3, n_head=4, n_embd=64) | SHAPES[shape]
    model = GPT(GPTConfig(**config, zero_init=zero_init))
    model.init_weights(0)
    x = tokens(8, 64, 500)
    exact = zero_init and not model.config.tied  # then the head is zero
    loss = model(x, x.roll(-1, 1)).item()
    assert abs(loss - math.log(500)) < (1e-3 if exact else 0.3)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_batch_can_be_overfitted(shape):
    model = make(shape, zero_init=True).train()
    x, optimizer = tokens(2), torch.optim.AdamW(model.parameters(), lr=1e-2)
    y = x.roll(-1, 1)
    for _ in range(120):
        loss = model(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.1:
            return
    pytest.fail(f"{loss.item()} after 120 steps")


def test_parameter_counts_are_the_published_ones():
    def count(**config) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in GPT(GPTConfig(**config)).parameters())

    size = dict(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768)
    assert count(**size | GPT2) == 124_439_808
    assert count(**size) == 162_129_408  # 12 * 12 * 768**2 + 2 * 50257 * 768: nothing else
    tiny_llama = LLAMA | dict(n_kv_head=4, mlp_dim=5632)
    size = dict(vocab_size=32000, block_size=2048, n_layer=22, n_head=32, n_embd=2048)
    assert count(**size | tiny_llama) == 1_100_048_384  # TinyLlama 1.1B


def test_gelu_is_gpt2s_tanh_form():
    x = torch.linspace(-4, 4, 101)
    mlp = make("gpt2").blocks[0].mlp
    with torch.no_grad():
        for layer in (mlp.up, mlp.down):
            layer.weight.zero_()
            layer.weight.view(-1)[:: layer.weight.size(1) + 1][:32] = 1  # the identity, in part
            layer.bias.zero_()
        y = mlp(x[:, None].expand(-1, 32))[:, 0]
    expected = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("mlp", BENDS)
def test_every_bend_of_the_mlp_bends_and_learns(mlp):
    """Two layers without it, or with a constant, were one; which numbers it gives is not asked."""
    g = torch.Generator().manual_seed(0)
    part = make("modern", mlp=mlp).blocks[0].mlp
    a, b = 3 * torch.randn(2, 64, 32, generator=g)
    y = part(a)
    straight = part(a + b) - part(b) + part(torch.zeros_like(a))  # y, if it were W x + c
    assert y.isfinite().all() and (straight - y).norm() > 0.05 * y.norm()
    for gradient in torch.autograd.grad(y.square().sum(), list(part.parameters())):
        assert gradient.isfinite().all() and gradient.any()


def test_rotary_positions_are_relative():
    config = GPTConfig(10, head_dim=16)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(i: int, j: int) -> float:
        turned_q = rotate(q, rotary(torch.tensor([i]), config))
        turned_k = rotate(k, rotary(torch.tensor([j]), config))
        return (turned_q * turned_k).sum().item()

    assert score(10, 4) == pytest.approx(score(56, 50), abs=1e-4)
    assert score(10, 4) != pytest.approx(score(10, 5), abs=1e-3)


def test_targets_of_minus_100_do_not_count():
    model, x = make("modern"), tokens()
    y = x.roll(-1, 1)
    y[:, ::2] = IGNORE
    logits = model(x)[:, 1::2].reshape(-1, 61)
    expected = torch.nn.functional.cross_entropy(logits, y[:, 1::2].reshape(-1))
    torch.testing.assert_close(model(x, y), expected)
    torch.testing.assert_close(model(x, y, reduction="sum") / 36, expected)


def test_weights_are_a_function_of_the_seed():
    a, b, c = (make("modern", seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["wte.weight"], c["wte.weight"])


def test_logits_are_capped():
    model = make("modern")
    with torch.no_grad():
        model.head.weight.mul_(1000)
    assert 14 < model(tokens()).abs().max() <= 15


@pytest.mark.parametrize(
    "setting", [dict(n_head=5), dict(n_kv_head=3), dict(mlp="relu"), dict(head_dim=7)]
)
def test_an_impossible_shape_is_refused(setting):
    name = next(iter(setting))
    with pytest.raises(ValueError, match=str(setting[name])):
        GPTConfig(**dict(vocab_size=10) | setting)


@pytest.mark.parametrize("shape", ["gpt2", "modern"])
def test_a_shorter_context_keeps_the_weights(shape):
    model, x = make(shape), tokens(2, 12)
    expected = model(x)
    set_context(model, 12, dropout=0.0)
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match="block_size"):
        model(tokens(2, 13))


def test_a_longer_context_needs_rotary_positions():
    learned, rotary = make("gpt2"), make("modern")
    with pytest.raises(ValueError, match="block_size=25 exceeds the 24 positions"):
        set_context(learned, 25, dropout=0.0)
    expected = rotary(tokens())
    set_context(rotary, 48, dropout=0.0)
    torch.testing.assert_close(rotary(tokens()), expected)
    assert rotary(tokens(1, 48)).shape == (1, 48, 61)


def test_positions_are_an_argument():
    model, x = make("gpt2"), tokens(2, 6)
    at = torch.arange(6)
    torch.testing.assert_close(model(x, positions=at), model(x))
    each = torch.stack((at, at + 5))  # a row that begins later
    y = model(x, positions=each)
    torch.testing.assert_close(y[:1], model(x[:1]))
    torch.testing.assert_close(y[1:], model(x[1:], positions=at + 5))
    assert not torch.allclose(y[1:], model(x[1:]))


@pytest.mark.parametrize("kind", ["window", "adjacency"])
def test_a_mask_may_be_a_window_or_the_edges_of_a_graph(kind):
    """In one layer a position depends on what its row of the mask allows, and on nothing else; in
    two, on what those depend on."""
    T, generator = 12, torch.Generator().manual_seed(0)
    at = torch.arange(T)
    if kind == "window":
        mask = (at[:, None] >= at) & (at[:, None] - at < 3)  # itself and two before it
    else:
        mask = torch.rand(T, T, generator=generator) < 0.2
        mask = mask | mask.T | torch.eye(T, dtype=torch.bool)  # who is joined to whom
    for layers in (1, 2):
        config = GPTConfig(50, block_size=T, n_layer=layers, n_head=2, n_embd=32, zero_init=False)
        model = GPT(config)
        model.init_weights(1)
        tokens = torch.randint(50, (1, T), generator=generator)
        reached = torch.linalg.matrix_power(mask.float(), layers) > 0
        with torch.no_grad():
            before = model.trunk(tokens, mask)
            for changed in range(T):
                other = tokens.clone()
                other[0, changed] = (other[0, changed] + 1) % 50
                differs = (model.trunk(other, mask) - before).abs().amax(dim=-1)[0] > 1e-6
                assert differs.tolist() == reached[:, changed].tolist()


@pytest.mark.parametrize("T", range(1, 10))
@pytest.mark.parametrize("batch", [None, (), (1, 1), (2, 1)])
def test_a_canon_layer_adds_shares_of_the_tokens_before_that_a_mask_shows(batch, T):
    canon, x = make("canon").blocks[1].mlp_canon, torch.randn(2, T, 32)
    mask = None if batch is None else torch.rand(*batch, T, T) < 0.5
    sees = torch.ones(2, 1, T, T) if mask is None else mask.expand(2, 1, T, T)
    expected = x.clone()
    for t in range(T):
        for i in range(1, min(3, t) + 1):
            expected[:, t] += sees[:, :, t, t - i] * canon.weight[i - 1] * x[:, t - i]
    torch.testing.assert_close(canon(x, mask, None), expected)


def test_no_short_convolution_reaches_over_the_border_of_two_texts():
    model, x = make("canon"), tokens(2, 12)
    row = torch.arange(12) // 7  # two texts of 7 and 5 tokens in a window
    mask = (row[:, None] == row) & torch.ones(12, 12, dtype=torch.bool).tril()
    together = model(x, mask=mask, positions=torch.arange(12) - 7 * row)
    for text in (slice(0, 7), slice(7, 12)):
        torch.testing.assert_close(together[:, text], model(x[:, text]), atol=1e-5, rtol=1e-5)
