"""What only a GPU does: compiled kernels, steps that are recorded, its memory.

`pytest --device=cuda` runs it, and all other tests there as well.
"""

import hashlib
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import on_gpu
from test_inference import CHANGES, goes_at_once, recordings, text
from test_model import SHAPES, make, tokens
from test_train import rows, training, weights

from engine import checkpoint, fast, replay
from engine.inference import ready
from engine.machine import pick, pick_device
from engine.replay import RecordedCache
from generate import answers, beam, generate
from pick import pick as pick_token
from pick import probabilities


@pytest.fixture(autouse=True)
def gpu():
    if not on_gpu():
        pytest.skip("for --device=cuda")


CUDA = torch.device("cuda", 0)


def test_auto_takes_the_gpu():
    here = pick()
    assert here.device == pick_device("auto", 1) == CUDA
    assert here.dtype == (torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_parts_agree_with_the_book(shape, dtype, training):
    found = fast.agreeing(make(shape).config, CUDA, dtype, training)
    assert {*found} >= {*fast.PARTS} - {"mlp"}  # whose bend may be somebody's own: test_fast.py


# --- training


SMALL = ["--dtype=bfloat16", "--steps=4", "--eval_every=4"]


@pytest.mark.parametrize("more", [[], ["--canon=4", "--n_kv_head=1"]], ids=["modern", "canon"])
def test_compiled_it_learns_what_it_learns_otherwise(train, more):
    plain = train("plain", *SMALL, *more)
    compiled = train("compiled", *SMALL, *more, "--compile=true", "--deterministic=false")
    for a, b in zip(training(plain), training(compiled), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.01)
    assert rows(plain)[-1]["val_loss"] == pytest.approx(rows(compiled)[-1]["val_loss"], rel=0.01)


def test_a_compiled_run_is_resumed(train):
    compiled = [*SMALL, "--compile=true", "--dropout=0.1", "--decay=0"]
    whole = train("whole", *compiled)
    train("parts", *compiled, "--steps=2")
    parts = train("parts", *compiled)
    for a, b in zip(training(whole), training(parts), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.01)
    assert [row["step"] for row in training(parts)] == [1, 2, 3, 4]


def test_shorter_numbers_lose_little(train):
    exact, short = (train(kind, f"--dtype={kind}") for kind in ("float32", "bfloat16"))
    for a, b in zip(training(exact), training(short), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05)
    assert weights(exact) != weights(short)


def test_the_gpu_learns_what_the_cpu_learns(train):
    there, here = train("there"), train("here", "--device=cpu")
    for a, b in zip(rows(there), rows(here), strict=True):
        for name in a.keys() & {"loss", "val_loss"}:
            assert a[name] == pytest.approx(b[name], abs=2e-3)


def test_a_run_moves_from_the_gpu_to_the_cpu_and_back(train, capsys):
    train("run", "--steps=4", "--decay=0")
    train("run", "--steps=6", "--decay=0", "--device=cpu")
    assert "device was cuda, is cpu: the same data, but not the same" in capsys.readouterr().out
    run = train("run", "--decay=0")
    assert [row["step"] for row in training(run)] == [*range(1, 9)]


def test_device_batch_auto_takes_all_where_there_is_room(train, capsys):
    run = train("run", "--device_batch=auto", "--steps=4", "--eval_every=4")
    said = capsys.readouterr().out
    assert "device_batch=auto: 8 windows in a pass (" in said
    state = json.loads((run / checkpoint.name(4) / "state.json").read_text())
    assert state["machine"]["device_batch"] == 8


def test_blocks_that_compute_again_take_less_memory_and_give_the_same_bits(train):
    more = ["--n_layer=8", "--dropout=0.2", "--canon=3", "--batch_tokens=4096", "--steps=4"]
    more += ["--eval_tokens=32"]
    found, digests = [], []
    for name in ("false", "true"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run = train(name, *more, f"--checkpoint_activations={name}", "--eval_every=4")
        found.append(torch.cuda.max_memory_allocated() - before)
        content = (run / checkpoint.name(4) / "model.safetensors").read_bytes()
        digests.append(hashlib.sha256(content).hexdigest())
    assert digests[0] == digests[1] and found[1] < 0.7 * found[0], found


# --- generating

recordings = recordings  # a fixture
CPU_ALONE = {"other weights", "a decision"}  # the latter cannot be recorded, nor is it noticed


def on(shape: str, recorded: bool, monkeypatch, dtype=torch.float32, rows: int = 1):
    monkeypatch.setattr(replay, "records", lambda device, batch=1: recorded)
    monkeypatch.setattr(replay, "WORTH_KERNELS", 0)  # at once
    return ready(make(shape).to(CUDA, dtype), rows=rows)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_recorded_step_has_the_logits_of_the_book_on_a_cpu(shape, dtype, error, monkeypatch):
    model, plain, x = on(shape, True, monkeypatch, dtype), make(shape), tokens()
    cache, growing = model.new_cache(3), plain.new_cache(3)
    assert isinstance(cache, RecordedCache)
    with torch.inference_mode():
        plain(x[:, :9], cache=growing)
        model(x[:, :9].to(CUDA), cache=cache)
        for i in range(9, 24):
            step = model(x[:, i : i + 1].to(CUDA), cache=cache).cpu()
            expected = plain(x[:, i : i + 1], cache=growing)
            assert (step - expected).norm() < error * expected.norm()
    assert cache.replay is not None
    if dtype == torch.float32 and shape in ("modern", "grouped", "gpt2", "llama", "qwen2"):
        assert type(cache.kernels).__name__ == "OneToken"


WAYS = [{}, dict(top_k=50), dict(top_p=0.9), dict(top_k=50, top_p=0.9), dict(temperature=0)]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("size", [300, 50257])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_gpu_picks_what_a_cpu_picks(way, size, deterministic):
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, size, generator=g)
    uniform = torch.rand(40, generator=g, dtype=torch.float64)
    wanted, p = pick_token(logits, uniform, **way), probabilities(logits, **way)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = pick_token(logits.to(CUDA), uniform, **way)
        assert found.device == CUDA and (found.cpu() == wanted).float().mean() > 0.9
        near = torch.isclose(probabilities(logits.to(CUDA), **way), p, atol=1e-5, rtol=1e-4)
        assert near.shape == p.shape  # where the share of top-p ends, rounding decides
        assert (~near).sum() <= ("top_p" in way)
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["modern", "gpt2", "canon"])
def test_a_step_serves_the_next_text(shape, dtype, monkeypatch, recordings):
    model, prompts = on(shape, True, monkeypatch, dtype), ([1, 2, 3], [9], [7, 5, 8, 2])
    alone = [text(on(shape, True, monkeypatch, dtype), *prompt) for prompt in prompts]
    recordings.clear()
    assert [text(model, *prompt) for prompt in prompts] == alone
    assert len(recordings) == 1


def test_kernels_go_where_somebody_changes_a_little(monkeypatch):
    model = on("gpt2", True, monkeypatch)
    text(model, 1, 2, 3)
    assert model.last.states[-1]["kernels"]
    kind = type(model.blocks[0].mlp)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 1.1 * forward(self, x))
    text(model, 1, 2, 3)
    assert not model.last.states[-1]["kernels"]


def test_what_a_step_gave_stays_and_a_model_goes_when_nobody_has_it(monkeypatch):
    for kernels in (math.inf, 0):
        model, given = on("gpt2", True, monkeypatch), []
        monkeypatch.setattr(replay, "WORTH_KERNELS", kernels)
        with torch.inference_mode():
            for prompt in ([1, 2], [3, 4], [5, 6]):
                cache = model.new_cache(size=9)
                model(torch.tensor([prompt], device=CUDA), cache=cache)
                given.append(model(torch.tensor([[7]], device=CUDA), cache=cache))
                del cache
        for prompt, found in zip(([1, 2, 7], [3, 4, 7], [5, 6, 7]), given, strict=True):
            wanted = make("gpt2")(torch.tensor([prompt]))[:, -1:]
            torch.testing.assert_close(found.cpu(), wanted, atol=1e-4, rtol=1e-3)
        models = [model]
        del model
        assert goes_at_once(models)


@pytest.mark.parametrize("change", sorted(CHANGES.keys() - CPU_ALONE))
def test_whoever_changes_a_model_between_two_texts_is_obeyed(change, monkeypatch):
    models = [on("gpt2", True, monkeypatch) for _ in range(2)]
    before = [text(m, 1, 2, 3) for m in models]
    for m in models:
        CHANGES[change](m, monkeypatch)
    after = text(models[0], 1, 2, 3)
    monkeypatch.setattr(RecordedCache, "ready", lambda self, T: False)
    assert after == text(models[1], 1, 2, 3)
    assert before[0] == before[1] != after


@pytest.mark.parametrize("length, rows", [(1, 3), (3, 1), (40, 3)])
@pytest.mark.parametrize("shape", ["modern", "grouped", "gpt2", "canon"])
def test_with_recorded_steps_the_text_is_the_same(shape, length, rows, monkeypatch):
    """Beyond the context, where it is read anew."""
    found = []
    for recorded in (True, False):
        model = on(shape, recorded, monkeypatch, rows=rows)
        found.append([*generate(model, [*range(length)], 40, num_samples=rows, temperature=0.7)])
    assert found[0] == found[1]


def test_answers_that_move_in_and_out_and_beams_are_the_same(monkeypatch):
    tokenizer = SimpleNamespace(ends=list(range(52, 61)), unused=[], markers=None)
    prompts = [list(range(i, 2 * i + 1)) for i in range(9)]
    found = []
    for recorded in (True, False):
        model = on("modern", recorded, monkeypatch, rows=4)
        some = dict(answers(model, tokenizer, prompts, 12, slots=4))
        found.append((some, [beam(model, tokenizer, prompt, 12) for prompt in prompts[:3]]))
    assert found[0] == found[1]


def test_where_all_is_deterministic_nothing_is_recorded():
    assert replay.records(CUDA)
    torch.set_deterministic_debug_mode("error")
    try:
        model = ready(make("modern").to(CUDA))
        assert not isinstance(model.new_cache(), RecordedCache)
        assert len([*generate(model, [1, 2], 30, num_samples=2, top_k=5, top_p=0.9)]) == 30
    finally:
        torch.set_deterministic_debug_mode("default")
