"""bench.py measures like beside like, and says what it leaves out."""

import dataclasses
import importlib
import json
import subprocess
import sys

import pytest
import torch

import bench
import peers
import stages
from engine import machine, measure

pytestmark = pytest.mark.cpu  # as its variants are: int8 and others
TINY = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--vocab_size=300", "--rows=2", "--length=16"]
TINY += ["--tokens=8", "--calls=2"]
SHAPE = dict(vocab_size=300, block_size=1024, n_layer=2, n_head=2, n_embd=32)


def measure_one(capsys, what: str, variant: str, *argv: str) -> dict:
    bench.main([what, *TINY, *argv, f"--only={variant}"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["value"] > 0
    return result


@pytest.mark.parametrize("shape", ["gpt2", "modern"])
@pytest.mark.parametrize(
    "what, variant",
    [
        ("train", "ours, float32"),
        ("decode", "ours, float32"),
        ("decode", "ours, float32, eight sequences"),
        ("decode", "ours, int8"),
    ],
)
def test_ours_is_measured_in_a_shape_of_any_size(what, variant, shape, capsys):
    assert measure_one(capsys, what, variant, f"--shape={shape}")["unit"] == "tokens/s"


@pytest.mark.parametrize("variant", ["one by one", "32 at once"])
def test_answers_are_measured(variant, capsys):
    assert measure_one(capsys, "answers", variant, "--answers=4")["unit"] == "answers/s"


@pytest.mark.parametrize("variant", ["training, running text", "training, rows"])
def test_learning_from_rows_is_measured_beside_running_text(variant, capsys):
    assert measure_one(capsys, "answers", variant)["unit"] == "tokens/s"


@pytest.mark.parametrize("what", ["train", "decode"])
def test_transformers_is_measured(what, capsys):
    pytest.importorskip("transformers", reason="the peer is not installed")
    assert measure_one(capsys, what, "transformers, float32")["unit"] == "tokens/s"


def test_the_limits_of_the_machine_are_measured(capsys, monkeypatch):
    monkeypatch.setattr(stages, "timed", lambda _, function: function() and 1.0)  # once is enough
    assert measure_one(capsys, "train", "matrix product, float32")["unit"] == "GFLOP/s"
    assert measure_one(capsys, "train", "memory read")["unit"] == "GB/s"


def test_preparing_is_measured_by_the_whole_command(capsys, monkeypatch):
    monkeypatch.setattr(stages, "library_text", lambda: "a line of text\n" * 3000)
    result = measure_one(capsys, "prepare", "ours", "--tokenizer=bytes")
    assert result["unit"] == "M tokens/s"


def test_the_peer_encodes_the_same_text(monkeypatch):
    """A megabyte a part, and nothing lost between them."""
    import tiktoken

    from tokenizer import bytes_tokenizer

    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: bytes_tokenizer().encoding)
    assert peers.tiktoken_encode("x" * 2_500_000, "gpt2") == 2_500_000


# --- like beside like


def test_the_peer_has_our_size_and_no_dropout():
    pytest.importorskip("transformers", reason="the peer is not installed")
    model = peers.transformers_gpt2(**SHAPE).train()
    ours = stages.our_model(bench.Settings(n_layer=2, n_head=2, n_embd=32, vocab_size=300))
    assert sum(p.numel() for p in model.parameters()) == ours.num_parameters()
    x = torch.arange(32).view(2, 16)
    assert torch.equal(model(x).logits, model(x).logits)


def test_the_peer_trains_with_our_optimizer_and_our_loss(monkeypatch, capsys):
    pytest.importorskip("transformers", reason="the peer is not installed")
    made, losses = [], []
    optimizer, backward = torch.optim.AdamW, torch.Tensor.backward

    def seen_optimizer(parameters, **options):
        made.append(options)
        return optimizer(parameters, **options)

    def seen_backward(loss, *more):
        losses.append(loss.item())
        return backward(loss, *more)

    monkeypatch.setattr(torch.optim, "AdamW", seen_optimizer)
    monkeypatch.setattr(torch.Tensor, "backward", seen_backward)
    for variant in ("ours, float32", "transformers, float32"):
        losses.clear()
        measure_one(capsys, "train", variant)
        assert losses[0] == pytest.approx(torch.tensor(300.0).log().item(), abs=0.3)  # ln V
    assert made == [{"fused": True}] * 2


# --- what is left out


def test_bfloat16_that_would_be_emulated_is_left_out(monkeypatch, capsys):
    real = machine.pick

    def slow(device="auto", dtype="auto", *more):
        here = real("cpu", dtype, *more)
        auto = dict(dtype=torch.float32, why="a CPU of 2013") if dtype == "auto" else {}
        return dataclasses.replace(here, **auto)

    monkeypatch.setattr(machine, "pick", slow)
    for what, variant in [
        ("train", "matrix product, bfloat16"),
        ("train", "ours, bfloat16"),
        ("train", "transformers, bfloat16"),
        ("decode", "ours, bfloat16, eight sequences"),
        ("decode", "transformers, bfloat16"),
    ]:
        with pytest.raises(ValueError, match="no fast bfloat16 here.*a CPU of 2013"):
            bench.main([what, *TINY, f"--only={variant}"])
    measure_one(capsys, "decode", "ours, bfloat16")  # one token at a time waits for memory instead


def test_what_is_left_out_is_said_with_its_reason_and_not_tried_again(monkeypatch, capsys):
    tried = []

    def run(command, **_):
        name = command[-1].removeprefix("--only=")
        tried.append(name)
        if name == "tiktoken":
            return subprocess.CompletedProcess(command, 2, "", "Warning\nbench.py: error: no way\n")
        line = json.dumps(dict(value=len(tried), unit="M tokens/s", peak_mb=None, more="all"))
        return subprocess.CompletedProcess(command, 0, f"something else\n{line}\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    bench.main(["prepare", "--rounds=3"])
    assert tried == ["ours", "tiktoken", "ours", "ours"]
    out, err = capsys.readouterr()
    assert err.count("left out: bench.py: error: no way") == 1
    rows = out.splitlines()
    assert len(rows) == 2 and " ".join(rows[1].split()) == "ours 3.00 M tokens/s 1.00 - all"


def test_the_table_has_medians_and_ratios(capsys):
    def runs(*values, unit="tokens/s"):
        return [dict(value=v, unit=unit, peak_mb=100 * v, more="") for v in values]

    measure.print_table({"a": runs(9, 2, 4), "b": runs(8), "c": runs(7, unit="GB/s")})
    _, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert rows[0] == ["a", "4.00", "tokens/s", "1.00", "400"]
    assert rows[1] == ["b", "8.00", "tokens/s", "2.00", "800"]
    assert rows[2][3] == "1.00"  # another unit begins anew


def test_it_starts_where_nobody_tells_the_peak_of_memory(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    try:
        assert importlib.reload(measure).figure(1.0, "s")["peak_mb"] is None
    finally:
        monkeypatch.undo()
        importlib.reload(measure)


def test_where_a_gpu_is_at_work_its_memory_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 18_800_000_000)
    assert measure.figure(1.0, "s")["peak_mb"] == 18_800


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["speed"], "what='speed' should be one of train, decode, speculate, answers, serve"),
        (["train", "--only=theirs"], "only='theirs' should be one of its variants"),
        (["train", "--rounds=0"], "rounds=0 should be at least 1"),
        (["train", "--shape=round"], "shape='round' should be one of gpt2, modern"),
    ],
)
def test_mistakes_are_named(argv, sentence):
    with pytest.raises(ValueError, match=sentence):
        bench.main(argv)
