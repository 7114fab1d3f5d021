"""What plan.py says beforehand, beside what is counted and kept when it happens."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_model import BENDS, SHAPES
from torch.utils.flop_counter import FlopCounterMode

import plan
from engine import arithmetic, fast
from model import GPT, GPTConfig
from optim import make_optimizers
from train import Settings

SMALL = dict(vocab_size=61, block_size=64, n_layer=2, n_head=4, n_embd=32)


def made(name: str, **more) -> GPT:
    model = GPT(GPTConfig(**SMALL | SHAPES[name] | more))
    model.init_weights(1)
    return model


@pytest.mark.parametrize("name", SHAPES)
def test_operations_are_those_that_are_counted(name):
    """The book computes all scores and masks half of them, where half would do."""
    model = made(name)
    c, T = model.config, 64
    x = torch.randint(c.vocab_size, (2, T))
    with FlopCounterMode(display=False) as counter:
        model(x, x).backward()
    masked = 6 * c.n_layer * 2 * c.n_head * c.head_dim * T / 2
    assert counter.get_total_flops() / x.numel() == arithmetic.products(c, T) + masked


@pytest.mark.parametrize("name", [*(name for name in SHAPES if name not in BENDS), "silu"])
def test_a_layer_leaves_behind_as_much_as_said(name):
    """Also with a bend that only model.py knows."""
    kept, new = [], name == "silu"
    T = fast.SHORT + 8  # where attention is computed as on a GPU: no scores are kept
    for n_layer in (1, 2):
        model = made("modern" if new else name, n_layer=n_layer, block_size=T)
        for block in model.blocks if new else ():
            block.mlp.activation, model.config.mlp = F.silu, name
        fast.install(model, [part for part in fast.PARTS if not (new and part == "mlp")])
        x = torch.randint(model.config.vocab_size, (2, T))
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found = {}

        def keep(z, found=found):
            found[z.untyped_storage().data_ptr()] = z  # held, or its place would be given to others
            return z

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda z: z):
            model(x, x)
        sizes = [z.untyped_storage().nbytes() for at, z in found.items() if at not in weights]
        kept.append(sum(sizes))
    said = 4 * x.numel() * arithmetic.activations(model.config)
    assert said <= kept[1] - kept[0] <= 1.12 * said  # more: norms' scales, joined weights


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_parameters_gradients_and_moments_are_as_large_as_said(optimizer):
    model = made("modern")
    s = Settings(optimizer=optimizer)
    optimizers = make_optimizers(model, s, torch.float32)
    x = torch.randint(61, (2, 64))
    model(x, x).backward()
    for o in optimizers:
        o.step()
    tensors = [z for o in optimizers for state in o.state.values() for z in state.values()]
    moments = sum(4 * z.numel() for z in tensors if z.numel() > 1)
    weights = sum(4 * (p.numel() + p.grad.numel()) for p in model.parameters())
    assert arithmetic.state(model.config, optimizer) == (weights, moments)


@pytest.mark.parametrize("vocab_size", [2048, 50257])
@pytest.mark.parametrize("params", ["1M", "3M", "10M", "30M", "124M", "350M", "1.5B", "70B"])
def test_a_shape_is_of_the_size_that_is_asked_for(params, vocab_size):
    wanted = plan.amount(params)
    found = plan.shape_of(wanted, GPTConfig(vocab_size=vocab_size)).parameters()
    small = wanted < 500 * vocab_size  # tables and little else: few sizes are possible
    assert abs(found / wanted - 1) < (0.7 if small else 0.04)


def test_a_head_of_its_own_is_kept_where_it_is_asked_for(capsys):
    plan.main(["--params=124M", "--tokens=2.5B", "--tied=false"])
    said = capsys.readouterr().out
    assert "tied=true" not in said and "(124M asked for" in said


def test_the_rule_of_thumb_stands_beside_what_is_counted(capsys):
    """GPT-2's smallest on 2.5 billion tokens, and a model with a table that is looked up."""
    plan.main(["--params=124M", "--tokens=2.5B", "--tflops=150", "--mfu=0.4", "--block_size=1024"])
    said = capsys.readouterr().out
    assert "n_layer=12, n_head=6, n_embd=768, vocab_size=50257, block_size=1024, tied=true" in said
    N, scores = 12 * 12 * 768**2 + 50257 * 768, 12 * 768 * 1024
    assert f"= 6 D (N + 9.44M for attention's scores); 6 N D would be {15e9 * N:.3g}\n" in said
    for hours in (f"{15e9 * (N + scores) / 60e12 / 3600:.3g} hours at", "by 6 N D 8.58 hours"):
        assert hours in said
    plan.main(["--n_layer=4", "--vocab_size=4096", "--block_size=128", "--tokens=1B"])
    looked_up = "= 6 D (N - 524k that are looked up + 65.5k for attention's scores)"
    assert looked_up in capsys.readouterr().out


def test_a_curve_is_found_again_and_the_planned_run_is_on_it(tmp_path, capsys):
    def curve(N, D):
        return 1.2 + 40 / N**0.3 + 300 / D**0.45

    c = dict(vocab_size=256, block_size=64, n_head=4)
    for i, (width, D) in enumerate([(32, 1e6), (64, 1e6), (128, 1e6), (64, 4e6), (128, 8e6)]):
        shape = c | dict(n_embd=width)
        N = arithmetic.products(GPTConfig(**shape), 0) / 6
        step = tmp_path / f"{i}" / "step-00000010"
        step.mkdir(parents=True)
        (step / "state.json").write_text(json.dumps(dict(model=shape)))
        row = dict(step=10, val_loss=curve(N, D), tokens=D)
        (step.parent / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    shape = ["--n_embd=256", "--block_size=64", "--vocab_size=256", "--tokens=20M"]
    plan.main([*map(str, sorted(tmp_path.iterdir())), *shape])
    *_, D, loss, found = capsys.readouterr().out.splitlines()[-1].split()
    N = arithmetic.products(GPTConfig(**c | dict(n_embd=256)), 0) / 6
    assert (D, loss) == ("20M", "?") and abs(float(found) - curve(N, 2e7)) < 2e-4


def test_losses_that_rise_with_size_have_no_curve():
    N, D = np.array([1e5, 2e5, 4e5, 1e5, 2e5]), np.array([1e6, 1e6, 1e6, 2e6, 2e6])
    with pytest.raises(ValueError, match="do not fall"):
        plan.fit(N, D, np.array([1.0, 2, 3, 1.5, 2.5]) + D / 1e6)


def test_what_does_not_fit_is_said(capsys):
    plan.main(["--params=70B", "--gpus=8"])
    assert "too little: more --gpus" in capsys.readouterr().out
    plan.main(["--params=7B", "--gpus=8", "--shard=false"])
    assert "too little: --shard=true" in capsys.readouterr().out
    plan.main(["--params=1.5B", "--tokens=30B", "--gpus=8"])
    said = dict(re.findall(r"--(\w+)=(\d+)", capsys.readouterr().out))
    share = int(said["batch_tokens"]) // 2048 // 8
    rows = int(said["device_batch"])
    assert 1 < rows < share and Settings(device_batch=rows).windows_in_a_pass(share) == rows


def test_a_measured_speed_tells_the_time_and_no_card_counts(capsys):
    shape = ["--n_layer=4", "--vocab_size=2048", "--block_size=256", "--tokens=3M"]
    plan.main([*shape, "--tokens_per_second=12k", "--price=0"])
    said = capsys.readouterr().out
    assert "4.17 minutes at the 12k tokens/s" in said and "--memory=GB" in said
    assert not any(word in said for word in ("80 GB", "TFLOP", "cost", "device_batch"))
    measured = [*shape, "--tokens_per_second=120k", "--memory=0.1", "--price=3"]
    plan.main(measured)
    said = capsys.readouterr().out
    assert "25 seconds" in said and "a card has 0.1 GB" in said and "--device_batch=" in said
    assert "0.00694 card hours, 0.0208 at 3 an hour" in said
    plan.main([*measured, "--tokens=1000M"])
    assert "2.31 hours" in capsys.readouterr().out


def test_a_run_takes_as_long_as_its_own_speed_says(train, capsys):
    """What train.py records is what plan.py asks for. Its speed is of updates alone; the clock of
    its log also counts what is between them."""
    folder = train("run", "--eval_every=30", "--save_every=30", "--batch_tokens=2048", "--steps=30")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "tokens_per_second" in row]
    took, tokens = (rows[-1][name] - rows[0][name] for name in ("seconds", "tokens"))
    each = tokens / (len(rows) - 1)
    speed = tokens / sum(each / row["tokens_per_second"] for row in rows[1:])
    capsys.readouterr()
    plan.main([f"--tokens_per_second={speed:.0f}", f"--tokens={tokens:.0f}", "--block_size=16"])
    said = float(re.search(r"time +(\S+) seconds", capsys.readouterr().out)[1])
    assert 0 < 0.98 * said <= took


def test_a_shape_that_is_far_from_what_was_asked_for_is_told(capsys):
    for params, off, far in (("1.3M", "+24.7", True), ("124M", "-0.4", False)):
        plan.main([f"--params={params}"])
        told = capsys.readouterr().out
        assert ("the nearest of about 64 channels" in told) == far
        assert f"({params} asked for: {off}%)" in told


@pytest.mark.parametrize(
    "wrong",
    [
        "--params=7x",
        "--params=0",
        "--params=1M --n_layer=3",
        "--tokens=10",
        "--mfu=0",
        "--tokens_per_second=0",
        "--gpu=h1000",
    ],
)
def test_mistakes(wrong):
    with pytest.raises(ValueError, match=wrong[2:].split("=")[0]):
        plan.main(wrong.split())


def test_runs_that_say_nothing(tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        plan.main([str(tmp_path)])


def test_the_table_of_what_fits_is_that_of_the_formulas(capsys):
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", (ROOT / "docs/hardware.md").read_text(), re.M)
    assert len(rows) == 4
    for memory, cells in rows:
        for i, size in enumerate(cells.split(" | ")):
            more = [f"--memory={memory}", "--block_size=1024", f"--gpus={8 if i > 1 else 1}"]
            more += [f"--optimizer={('muon', 'adamw')[i % 2]}", "--tokens=1B"]
            plan.main([f"--params={size}", *more])
            assert "--device_batch=" in capsys.readouterr().out
            plan.main([f"--params={1.06 * plan.amount(size) / 1e9:.3f}B", *more])
            assert "too little" in capsys.readouterr().out
