"""The compiled pass of one token computes what the model computes, and takes its place in time."""

import gc
import math
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_inference import CHANGES, goes_at_once, late, text
from test_model import SHAPES, make
from torch import nn

from engine import blas, replay
from engine.inference import ready
from engine.linear import EightBitLinear, Fastest, PackedLinear, PlainLinear, packable
from generate import generate
from model import Attention, Block, KVCache, gelu
from speculate import Draft, lookup, speculate

numba = pytest.importorskip("numba")
types = numba.types
one_token_cpu = pytest.importorskip("engine.one_token_cpu")
loops = one_token_cpu.loops
FASTER = one_token_cpu.faster
ROOT = Path(__file__).parent.parent
FIT = [shape for shape in SHAPES if shape != "canon"]


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Whether it is faster is not asked."""
    monkeypatch.setattr(replay, "PATIENCE", 0)
    monkeypatch.setattr(replay, "WORTH_NUMBA", 0)
    monkeypatch.setattr(one_token_cpu, "faster", lambda *_: True)


def compiled(model) -> bool:
    """Whether the last text's step was."""
    last = model.last
    return bool(last) and isinstance(last.states[-1].get("replay"), one_token_cpu.OneToken)


@pytest.mark.parametrize("shape", FIT)
@pytest.mark.parametrize("threads", [1, 2])
def test_it_writes_the_same_text(shape, threads):
    with blas.using(threads):
        model, prompts = ready(make(shape)), ([1, 2, 3], [9], [7, 5, 8, 2])
        for prompt in prompts:
            assert text(model, *prompt) == text(make(shape), *prompt)
        assert compiled(model)


def logits(model, cache) -> list[torch.Tensor]:
    """Those of 24 tokens, one after another."""
    with torch.inference_mode():
        return [model(torch.tensor([[n * 7 % 61]]), cache=cache) for n in range(24)]


@pytest.mark.parametrize("shape", FIT)
@pytest.mark.parametrize(("kind", "threads"), [("bfloat16", 1), ("int8", 1), ("int8", 2)])
def test_it_reads_what_layers_read(shape, kind, threads):
    """Of bfloat16 or eight bits, for which activations have sixteen."""
    with blas.using(threads):
        reads_what_layers_read(shape, kind)


def reads_what_layers_read(shape, kind):
    if kind == "bfloat16" and "half" not in Fastest(torch.bfloat16, []).forms:
        pytest.skip("no form of bfloat16 here that loops read")
    dtype, quantize = (torch.bfloat16, "") if kind == "bfloat16" else (torch.float32, kind)
    model, plain = (ready(make(shape).to(dtype), quantize) for _ in range(2))
    errors = []
    with torch.inference_mode():
        cache = model.new_cache()
        for n in range(24):
            token, other = torch.tensor([[n * 7 % 61]]), replay.KVCache(model.config, 1)
            other.k[:, :, :, :n], other.v[:, :, :, :n] = cache.k[..., :n, :], cache.v[..., :n, :]
            other.lengths.fill_(n)
            found, true = model(token, cache=cache), plain(token, cache=other)
            errors.append(float((found - true).norm() / true.norm()))
    assert max(errors) < (1e-5 if kind == "bfloat16" else 3e-4)
    assert isinstance(cache.replay, one_token_cpu.OneToken)


@pytest.mark.parametrize("shape", FIT)
@pytest.mark.parametrize("quantize", ["", "int8"])
def test_it_reads_several_tokens_at_once(shape, quantize, monkeypatch):
    """As one by one; and each sees what was before it, of a text that had this memory before."""
    passes = counted(monkeypatch)
    model, tokens = ready(make(shape), quantize), torch.arange(24)[None] * 7 % 61
    with torch.inference_mode():
        one_by_one = torch.cat(logits(model, model.new_cache()), dim=1)
        cache, found = model.new_cache(), []
        step = cache.loops
        assert step and cache.inherited
        passes.clear()
        for some in tokens.split([3, 1, 5, 6, 2, 7], dim=1):
            found.append(model(some, cache=cache))
            assert cache.loops is step
        assert cache.lengths.tolist() == [24]
        # the first token is asked for alone: was the model changed since the last text?
        assert passes == [1, 3, 1, 5, 6, 2, *([7] if quantize else [])]
        assert {*step.choices} == {*passes}  # how many threads each number of tokens gets
        with pytest.raises(ValueError, match="26 positions do not fit in a KV cache of 24"):
            model(tokens[:, :2], cache=cache)
    error = 2e-3 if quantize else 1e-4
    torch.testing.assert_close(torch.cat(found, dim=1), one_by_one, atol=error, rtol=error)


def counted(monkeypatch) -> list[int]:
    """Will hold the number of tokens of every pass by loops."""
    passes, whole_pass = [], loops.whole_pass

    def counting(ids, *more):
        passes.append(len(ids))
        whole_pass(ids, *more)

    monkeypatch.setattr(loops, "whole_pass", counting)
    return passes


def test_several_tokens_come_to_loops_by_themselves(monkeypatch):
    """Also where a draft has a guess for each pass; and not where they cannot."""
    passes = counted(monkeypatch)
    for shape, wanted in (("gpt2", [9, 4]), ("canon", [])):
        model, plain = ready(make(shape)), make(shape)
        cache, other, found = model.new_cache(), plain.new_cache(), []
        with torch.inference_mode():
            for some in torch.arange(20)[None].split([9, 4, 7], dim=1):
                passes.clear()
                torch.testing.assert_close(
                    model(some, cache=cache), plain(some, cache=other), atol=1e-4, rtol=1e-4
                )
                found += passes[-1:]
        assert found == wanted and cache.lengths.tolist() == [20]


@pytest.mark.parametrize("kind", ["canon", "packed", "a forward of its own"])
def test_models_of_another_kind_keep_what_was_recorded(kind):
    model = ready(make("canon" if kind == "canon" else "gpt2"))
    block, up = model.blocks[1], make("gpt2").blocks[1].mlp.up
    if kind == "packed":
        if not packable(torch.float32):
            pytest.skip("oneDNN has no float32 here")
        block.mlp.up = PackedLinear(up.weight, up.bias)
    elif kind == "a forward of its own":
        block.forward = late(block.forward, begin=99)
    assert len(text(model, 1, 2, 3)) == 20
    assert model.last.states[-1]["replay"] and not compiled(model)


def test_layers_of_two_kinds_are_not_read_as_one():
    model = ready(make("gpt2"), "int8")
    up = make("gpt2").blocks[1].mlp.up
    assert one_token_cpu.Weights(model)
    model.blocks[1].mlp.up = EightBitLinear(up.weight, up.bias, width=32)
    assert one_token_cpu.Weights(model)  # the width of a bag's blocks is nothing to it
    model.blocks[1].mlp.up = PlainLinear(up.weight, up.bias)
    with pytest.raises(ValueError, match="layers of"):
        one_token_cpu.Weights(model)


def product(W, x, parts=1, begin=0) -> np.ndarray:
    """W x (T, O) by loops, of x (T, I); the rows of W (O, I) stand from `begin` on in their
    streams."""
    groups, (rows, columns) = parts * loops.GROUPS, W.shape
    each = rows // (groups * loops.STREAMS)
    count = each * groups * loops.STREAMS
    streams = np.full((groups, loops.STREAMS, begin + each * columns + 3), 99, W.dtype)
    streams[:, :, begin : begin + each * columns] = W[:count].reshape(*streams.shape[:2], -1)
    layer = streams, begin, W[count:], np.zeros(rows, np.float32), np.ones(rows, np.float32)
    room = np.zeros(x.size + 5, np.int16), np.zeros(len(x) + 1, np.float32)
    room = *room, np.empty((len(x) + 1, rows + 3), np.float32)
    y = np.full((len(x), rows), np.nan, np.float32)
    loops.product(layer, x, loops.PLAIN, np.float32(0), room, y)
    return y


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 64, 3000])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 100])
@pytest.mark.parametrize(("parts", "begin"), [(1, 0), (2, 48), (3, 5)])
@pytest.mark.parametrize("kind", [np.int8, np.float32])
def test_products_are_exact_to_a_part_in_ten_thousand(rows, columns, parts, begin, kind):
    g = np.random.default_rng(rows * columns)
    W = g.integers(-127, 128, (rows, columns)).astype(kind)
    x = (g.normal(size=(3, columns)) * [[1], [100], [0.1]]).astype(np.float32)
    true, sizes = x.astype(np.float64) @ W.T, np.linalg.norm(W) * np.linalg.norm(x, axis=1)
    for number in (1, 3):
        found = product(W, x[:number], parts, begin)
        assert (np.abs(found - true[:number]).max(axis=1) <= 1e-4 * sizes[:number]).all()


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_streams_go_on_where_the_matrix_before_ends(shape, threads, monkeypatch):
    monkeypatch.setattr(one_token_cpu, "NUMBA_NUM_THREADS", 8)
    model, at = ready(make(shape), "int8"), 0
    with blas.using(threads):
        weights = one_token_cpu.Weights(model)
    blocks = [weights.blocks[n] for n in range(len(weights.blocks))]
    for block, ((_, wqkv, _, _, wo), (_, gate, up, down, _)) in zip(
        model.blocks, blocks, strict=True
    ):
        gates = [(block.mlp.gate, gate)] if block.mlp.gate else []
        read = [(block.attn.wqkv, wqkv), (block.attn.wo, wo), *gates]
        for layer, found in [*read, (block.mlp.up, up), (block.mlp.down, down)]:
            at = goes_on(layer, found, at, threads)
    goes_on(model.head.layer, weights.head[1], at, threads)


def goes_on(layer, found, at: int, threads: int) -> int:
    """Where a layer's rows end that begin `at`, if nothing is missing and nothing kept for it."""
    streams, begin, rest, _, _ = found
    assert begin == at and streams.shape[:2] == (threads * loops.GROUPS, loops.STREAMS)
    end = at + (layer.outputs - len(rest)) // math.prod(streams.shape[:2]) * layer.inputs
    rows = streams[:, :, begin:end].reshape(-1, layer.inputs)
    assert np.array_equal(np.concatenate([rows, rest]), layer.whole_numbers().numpy())
    assert rest.base.untyped_storage().nbytes() == rest.nbytes
    return end


def test_a_block_in_two_places_is_dealt_once():
    model = ready(make("gpt2"), "int8")
    model.blocks[1] = model.blocks[0]
    weights = one_token_cpu.Weights(model)
    assert weights.blocks[0][0][1][1] == weights.blocks[1][0][1][1] == 0


@pytest.mark.parametrize("columns", [16, 700, 30_000])
@pytest.mark.parametrize("x", [1.0, -1.0, 3e38, 1e-20])
def test_the_largest_sums_do_not_overflow(columns, x):
    """All of x as large as the largest, all weights as well."""
    W = np.full((17, columns), -127, np.int8)  # sixteen are read side by side, one is left
    vector = np.full((1, columns), x, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        found = product(W, vector)
        if np.isfinite(np.abs(vector).sum()):
            assert np.allclose(found, -127.0 * columns * np.float64(x), rtol=1e-3)
        else:
            assert not np.isfinite(found).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_sum_of_what_is_not_finite_is_not(bad):
    W, x = np.ones((17, 40), np.int8), np.ones((3, 40), np.float32)
    x[1, 33] = bad
    assert np.isfinite(product(W, x)).all(axis=1).tolist() == [True, False, True]
    assert not product(W, np.zeros_like(x)).any()


def test_what_is_not_finite_stays_so():
    model = ready(make("modern"))
    text(model, 1, 2, 3)
    assert compiled(model)
    model.blocks[1].mlp.down.matrix[3, 5] = torch.nan
    with torch.inference_mode():
        cache = model.new_cache()
        assert model(torch.tensor([[1]]), cache=cache).isnan().all()
    with pytest.raises(ValueError, match="finite"):
        text(model, 1, 2, 3)


@pytest.mark.parametrize("guess", ["lookup", "draft"])
def test_it_takes_back_what_was_guessed(guess):
    plain, small = make("llama"), ready(make("gpt2", seed=3))
    model = ready(make("llama"), several=True)
    guesser = lookup if guess == "lookup" else Draft(small, model)
    wanted = [token for [token] in generate(plain, [1, 2, 1, 2, 1], 18, temperature=0)]
    found = speculate(model, [1, 2, 1, 2, 1], 18, guesser, temperature=0)
    assert [token for [token] in found] == wanted
    assert compiled(model)


@pytest.mark.parametrize("edit", ["attention", "block", "late"])
def test_whoever_edits_the_book_is_obeyed(edit, monkeypatch):
    """Also if only the last place of the context tells."""
    kind = Attention if edit == "attention" else Block
    forward = kind.forward

    def edited(self, x, *more):
        if edit == "late":
            return late(forward.__get__(self), begin=22)(x, *more)
        return forward(self, 1.1 * x, *more)

    monkeypatch.setattr(kind, "forward", edited)
    model = ready(make("gpt2"))
    assert text(model, 1, 2, 3) == text(make("gpt2"), 1, 2, 3)
    assert not compiled(model)


@pytest.mark.parametrize("change", CHANGES)
def test_whoever_changes_a_model_between_two_texts_is_obeyed(change, monkeypatch):
    models = ready(make("gpt2")), ready(make("gpt2"))
    before = [text(model, 1, 2, 3) for model in models]
    assert all(map(compiled, models))
    for model in models:
        CHANGES[change](model, monkeypatch)
    after = text(models[0], 1, 2, 3)
    monkeypatch.setattr(replay.RecordedCache, "ready", lambda self, T: False)
    assert after == text(models[1], 1, 2, 3)
    assert after != before[0]


def test_what_is_slower_is_not_taken(monkeypatch):
    quick, slow = (lambda: None), (lambda: time.sleep(0.002))
    assert FASTER(quick, slow) and not FASTER(slow, quick)
    monkeypatch.setattr(one_token_cpu, "faster", lambda *_: False)
    model = ready(make("gpt2"))
    assert text(model, 1, 2, 3) == text(make("gpt2"), 1, 2, 3)
    assert not compiled(model)


def test_it_comes_after_as_many_weights_as_it_takes_to_load(monkeypatch):
    """And not after seconds: the same seed gives the same text."""
    model = ready(make("gpt2"))
    monkeypatch.setattr(replay, "WORTH_NUMBA", 25 * model.config.parameters())
    monkeypatch.setattr(replay.RecordedCache, "read", 0)
    before = text(model, 1, 2, 3)  # of 20 tokens 19 are read one by one
    assert not compiled(model)
    assert text(model, 1, 2, 3) == before
    assert replay.RecordedCache.read == 38 * model.config.parameters() and compiled(model)


BEGIN = """
import os, torch
from test_model import make
from test_one_token_cpu import compiled, one_token_cpu, ready, replay, text

torch.set_num_threads(NUMBER)
replay.PATIENCE = replay.WORTH_NUMBA = 0
one_token_cpu.faster = lambda *_: True
model, made, record = ready(make("gpt2")), [], replay.RecordedCache.record
replay.RecordedCache.record = lambda *a: made.append(1) or record(*a)
before = text(model, 1, 2, 3)
"""


def alone(end: str, number: int) -> subprocess.CompletedProcess:
    """A process of its own that has written a text with so many threads, and goes on so."""
    argv = [sys.executable, "-c", BEGIN.replace("NUMBER", str(number)) + end]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = os.environ | {"PYTHONPATH": path}
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("number", [1, 3])
def test_torch_keeps_its_number_of_threads(number):
    """numba's OpenMP, which is torch's, sets it to all cores when it begins, once a process."""
    done = alone("print(compiled(model), len(made), torch.get_num_threads())", number)
    assert done.stdout == f"True 1 {number}\n", done.stderr


FORKS = """
begun, child = compiled(model), os.fork()
again = text(model, 1, 2, 3) == before
print(begun, again, compiled(model), flush=True)
if child:
    print(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_does_without():
    """GNU's OpenMP would end it."""
    done = alone(FORKS, 1)
    found = sorted(done.stdout.split("\n"))
    assert found == ["", "0", "True True False", "True True True"], done.stderr


def test_a_model_goes_when_nobody_has_it():
    """Although its last text's memory waits for the next."""
    model = ready(make("gpt2"), "int8")
    text(model, 1, 2, 3)
    assert compiled(model) and model.loops.weights
    models = [model]
    del model
    assert goes_at_once(models)


def test_texts_of_a_model_share_its_weights():
    model = ready(make("gpt2"), "int8")
    both = [generate(model, [1, 2, 3], 20, temperature=0) for _ in range(2)]
    assert [a == b for a, b in zip(*both, strict=True)] == [True] * 20
    model, caches = ready(make("gpt2"), "int8"), []
    with torch.inference_mode():
        for _ in range(2):
            caches.append(model.new_cache())
            model(torch.tensor([[1]]), cache=caches[-1])
    first, second = (cache.replay.weights for cache in caches)
    assert first is second


@pytest.mark.parametrize("part", ["mlp", "head", "norm"])
def test_a_part_of_another_size_is_not_read(part):
    model = ready(make("gpt2"))
    block = model.blocks[1]
    if part == "mlp":  # somebody has made it narrower
        block.mlp.up.matrix, block.mlp.up.bias = block.mlp.up.matrix[:100], block.mlp.up.bias[:100]
        block.mlp.down.matrix = block.mlp.down.matrix[:, :100]
    elif part == "head":
        model.head.layer.matrix = model.head.layer.matrix[:50]
    else:
        block.attn_norm = nn.Identity()
    with pytest.raises(ValueError, match="should be|is no norm"):
        one_token_cpu.Weights(model)
    assert len(text(model, 1, 2, 3)) == 20 and not compiled(model)


@pytest.mark.parametrize("table", ["wte", "wpe"])
def test_no_row_behind_a_table_is_read(table):
    """Where torch says so, loops would read whatever stands there."""
    model = ready(make("gpt2"))
    weights = one_token_cpu.Weights(model)
    longer = KVCache(model.config, 1, size=30)
    with pytest.raises(ValueError, match="30 tokens, of which 24 have a position"):
        one_token_cpu.OneToken(weights, longer, torch.tensor([[1]]), torch.tensor([[29]]))
    step = one_token_cpu.OneToken(weights, model.new_cache(), torch.tensor([[61]]), torch.zeros(1))
    with pytest.raises(IndexError, match="61 is no token"):
        step()
    embedding = getattr(model, table)
    embedding.weight = nn.Parameter(embedding.weight[:20])
    with pytest.raises(ValueError, match="an embedding of"):
        one_token_cpu.Weights(model)


@pytest.mark.parametrize("quantize", ["", "int8"])
def test_an_activation_that_was_edited_is_not_taken_for_what_it_was(quantize, monkeypatch):
    """With eight bits the logits would not tell."""
    model = ready(make("gpt2"), quantize)
    assert one_token_cpu.Weights(model)
    monkeypatch.setattr(gelu, "__code__", (lambda x: F.gelu(x)).__code__)
    with pytest.raises(ValueError, match="edited"):
        one_token_cpu.Weights(model)


def test_a_processor_without_that_instruction_gets_other_loops(monkeypatch):
    """Which are compiled for it, and known by their name: so here, anew."""
    W = types.Array(types.int8, 2, "C")
    assert loops.by_sixteen_bits(W) and not loops.by_sixteen_bits(W.copy(dtype=types.float32))
    codegen = type(loops.cpu_target.target_context.codegen())
    monkeypatch.setattr(codegen, "magic_tuple", lambda self: ("", "generic", "-avx2"))
    assert not loops.by_sixteen_bits(W)


def test_a_head_of_zeros_is_no_agreement():
    model = ready(make("modern", zero_init=True))
    assert len(text(model, 1, 2, 3)) == 20 and not compiled(model)


def test_a_refused_trial_leaves_nothing_behind():
    """Eight bits are copied: whoever changes them later gets what is recorded, with its keys."""
    model, plain = ready(make("gpt2"), "int8"), ready(make("gpt2"), "int8")
    with torch.inference_mode():
        logits(model, model.new_cache())
        assert compiled(model)
        for m in (model, plain):
            m.blocks[0].attn.wqkv.rows[:, :96] ^= 0x55
        cache, other = model.new_cache(), replay.KVCache(model.config, 1)
        for n in range(8):
            token = torch.tensor([[n * 7 % 61]])
            found, true = model(token, cache=cache), plain(token, cache=other)
            torch.testing.assert_close(found, true, atol=1e-4, rtol=1e-4)
    assert not isinstance(cache.replay, one_token_cpu.OneToken)


def test_a_model_whose_part_knows_it_goes_as_well():
    model = ready(make("gpt2"))
    object.__setattr__(model.blocks[0], "owner", model)
    text(model, 1, 2, 3)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_under_autocast_the_loops_go_on():
    model = ready(make("modern"))
    with torch.inference_mode():
        cache = model.new_cache()
        for _ in range(3):
            model(torch.tensor([[1]]), cache=cache)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(torch.tensor([[1]]), cache=cache).isfinite().all()
    assert isinstance(cache.replay, one_token_cpu.OneToken)
