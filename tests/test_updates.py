"""What one update of a real run does: its rate, its clipping, its dropout, its float16 gradients.

The runs are watched from outside: by hooks that torch calls before every step of any optimizer,
by metrics.jsonl, and by the weights in the checkpoints.
"""

import json
import math

import forked
import pytest
import torch
from conftest import TINY, write_shards
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from engine.metrics import read_metrics
from model import GPT, Block
from objectives.next_token import Objective
from optim import Muon

STILL = ["--lr=0", "--embed_lr=0", "--head_lr=0"]  # weights stay as they are
WARM = ["--warmup=2", "--decay=0.5"]
# of 8 updates: two rise, two hold, and the last four fall towards 0 at update 9
FACTORS = [1 / 3, 2 / 3, 1, 1, 1, 0.75, 0.5, 0.25]


@pytest.fixture
def watched():
    """A list of what each optimizer was about to do: (optimizer, its rates, its gradients)."""
    seen = []

    def note(optimizer, *_):
        rates = [group["lr"] for group in optimizer.param_groups]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append((optimizer, rates, [p.grad.float().clone() for p in parameters]))

    handle = register_optimizer_step_pre_hook(note)
    yield seen
    handle.remove()


def column(run, key: str) -> list:
    return [row[key] for row in read_metrics(run) if key in row]


def norms(seen: list, optimizers: int = 2) -> list[float]:
    """The norm of all gradients at each update; two optimizers take part in one under muon."""
    updates = [seen[i : i + optimizers] for i in range(0, len(seen), optimizers)]
    return [math.hypot(*(g.norm().item() for *_, gs in up for g in gs)) for up in updates]


# --- rates


def test_every_rate_follows_the_schedule_from_the_first_update_to_the_last(train, watched):
    rates = dict(lr=0.02, embed_lr=0.3, head_lr=0.004)
    run = train("run", *WARM, *(f"--{name}={value}" for name, value in rates.items()))
    assert column(run, "lr") == pytest.approx([0.02 * f for f in FACTORS])
    of_muon = [used for optimizer, used, _ in watched if isinstance(optimizer, Muon)]
    of_adamw = [used for optimizer, used, _ in watched if not isinstance(optimizer, Muon)]
    assert of_muon == [pytest.approx([0.02 * f]) for f in FACTORS]
    assert [sorted(used) for used in of_adamw] == [
        pytest.approx([0.004 * f, 0.3 * f]) for f in FACTORS
    ]


def test_the_first_update_moves_weights_by_the_first_rate(train):
    """AdamW's first update is the rate itself, up or down, wherever there is a gradient."""
    adamw = ["--optimizer=adamw", "--zero_init=false", "--steps=2", "--save_every=1", *WARM]
    still, moved = train("still", *adamw, "--lr=0"), train("moved", *adamw, "--lr=0.01")
    weights = [load_file(run / "step-00000001" / "model.safetensors") for run in (still, moved)]
    change = (weights[1]["head.weight"] - weights[0]["head.weight"]).abs()
    assert change.max().item() == pytest.approx(0.01 / 3, rel=1e-3)


def test_a_continued_run_takes_up_the_schedule_where_it_stood(train, watched):
    train("run", *WARM, "--steps=4")
    watched.clear()
    run = train("run", *WARM)
    of_muon = [used for optimizer, used, _ in watched if isinstance(optimizer, Muon)]
    assert of_muon == [pytest.approx([0.02 * f]) for f in FACTORS[4:]]
    assert column(run, "lr")[4:] == pytest.approx([0.02 * f for f in FACTORS[4:]])


# --- clipping


def test_gradients_are_clipped_together_and_logged_as_they_were(train, watched):
    free = train("free", "--grad_clip=0", *STILL)
    for used, logged in zip(norms(watched), column(free, "grad_norm"), strict=True):
        assert used == pytest.approx(logged, rel=1e-4) and used > 0.01
    watched.clear()
    clipped = train("clipped", "--grad_clip=0.01", *STILL)
    assert norms(watched) == pytest.approx([0.01] * 8, rel=1e-3)
    assert column(clipped, "grad_norm") == pytest.approx(column(free, "grad_norm"), rel=1e-5)


def test_small_gradients_are_left_alone(train, watched):
    run = train("run", "--grad_clip=1000", *STILL)
    assert norms(watched) == pytest.approx(column(run, "grad_norm"), rel=1e-4)


# --- float16


def test_gradients_of_float16_are_those_of_float32(train, watched):
    """The scale of the loss is gone before anything looks at the gradients."""
    settings = [*STILL, "--zero_init=false", "--grad_clip=0"]
    exact = column(train("exact", *settings), "grad_norm")
    wanted = norms(watched)
    watched.clear()
    half = train("half", *settings, "--dtype=float16", "--steps=24", "--decay=0")
    logged = [norm for norm in column(half, "grad_norm") if norm is not None]
    assert len(logged) == len(norms(watched)) > 8  # the first scales may be too large
    overflows = 24 - len(logged)
    assert logged[: 8 - overflows] == pytest.approx(exact[overflows:], rel=0.02)
    assert norms(watched)[: 8 - overflows] == pytest.approx(wanted[overflows:], rel=0.02)


def test_an_update_that_overflows_is_left_out_and_the_scale_halved(train, watched, monkeypatch):
    """The first loss is so large that its gradients, times the scale, have no float16."""
    settings = ["--dtype=float16", "--zero_init=false", "--steps=2", "--save_every=1"]
    still = train("still", *settings, *STILL)
    watched.clear()
    original, factors = Objective.loss, [1e4]

    def large_at_first(*args):
        (nats,) = original(*args)
        return [nats * (factors.pop() if factors else 1.0)]

    monkeypatch.setattr(Objective, "loss", large_at_first)
    run = train("run", *settings)
    first, second = column(run, "grad_norm")
    assert first is None and math.isfinite(second)
    assert len(watched) == 2  # muon and adamw, at the second step alone
    began, after = (load_file(r / "step-00000001" / "model.safetensors") for r in (still, run))
    assert all(torch.equal(began[name], after[name]) for name in began)
    scales = [json.loads((r / "step-00000001" / "state.json").read_text()) for r in (still, run)]
    assert scales[1]["loss_scale"][0] == scales[0]["loss_scale"][0] / 2


def test_a_continued_run_keeps_the_scale_of_its_loss(train):
    """And its count of good steps."""
    half = ["--dtype=float16", "--save_every=1"]

    def scale(run, step: int) -> list:
        return json.loads((run / f"step-{step:08d}" / "state.json").read_text())["loss_scale"]

    whole, parts = train("whole", *half), train("parts", *half, "--steps=4")
    before = scale(parts, 4)
    train("parts", *half)
    assert scale(parts, 8) == scale(whole, 8) == [before[0], before[1] + 4]


# --- dropout in training


@pytest.fixture(scope="module")
def one_window(tmp_path_factory):
    """Public shards with a single window of 32 tokens: every row of every batch is the same."""
    window = range(65, 65 + 33)
    return write_shards(tmp_path_factory.mktemp("one_window"), train=window, val=window)


DROPPING = [*STILL, "--zero_init=false", "--dropout=0.5", "--steps=4", "--tokenizer=bytes"]


def losses(train, name: str, one_window, rows: int, *more: str) -> list[float]:
    run = train(name, *DROPPING, f"--batch_tokens={32 * rows}", *more, data=one_window)
    return column(run, "loss")


def test_without_dropout_equal_rows_have_equal_losses(train, one_window):
    """What the tests below rest on."""
    one = losses(train, "one", one_window, 1, "--dropout=0")
    two = losses(train, "two", one_window, 2, "--dropout=0", "--device_batch=1")
    assert one == pytest.approx([one[0]] * 4, abs=1e-5) and two == pytest.approx(one, abs=1e-5)


def test_every_step_drops_something_else(train, one_window):
    assert len(set(losses(train, "run", one_window, 1))) == 4


def test_every_micro_batch_drops_something_else(train, one_window):
    alone = losses(train, "alone", one_window, 1)
    in_two = losses(train, "in_two", one_window, 2, "--device_batch=1")  # the mean of two losses
    for a, b in zip(alone, in_two, strict=True):
        assert abs(a - b) > 1e-4


@pytest.mark.cpu
def test_every_process_drops_something_else(train, one_window, tmp_path):
    alone = losses(train, "alone", one_window, 1)
    argv = [tmp_path / "empty.py", f"--data={one_window}", f"--out={tmp_path / 'two'}", *TINY]
    forked.together(2, "train.py", *argv, *DROPPING, "--batch_tokens=64")
    for a, b in zip(alone, column(tmp_path / "two", "loss"), strict=True):
        assert abs(a - b) > 1e-4


def test_evaluation_in_a_run_with_dropout_drops_nothing(train):
    dropping = train("dropping", *STILL, "--zero_init=false", "--dropout=0.5")
    plain = train("plain", *STILL, "--zero_init=false")
    assert column(dropping, "val_loss") == column(plain, "val_loss")
    assert column(dropping, "loss") != column(plain, "loss")
    assert len(set(column(plain, "val_loss"))) == 1


# --- how the weights begin


@pytest.mark.parametrize("zero_init", ["true", "false"])
def test_weights_begin_with_the_published_spread(train, zero_init):
    """GPT-2: N(0, 0.02), residual projections smaller by sqrt(2 n_layer); or arXiv:2203.03466."""
    shape = [f"--zero_init={zero_init}", "--n_layer=8", "--n_embd=64", "--steps=1"]
    run = train("run", *STILL, *shape)
    for name, w in load_file(run / "step-00000001" / "model.safetensors").items():
        residual = name.endswith(("wo.weight", "down.weight"))
        if zero_init == "false":
            expected = 0.02 / math.sqrt(2 * 8) if residual else 0.02
        elif residual or name == "head.weight":
            expected = 0.0
        else:
            expected = 1.0 if name == "wte.weight" else 1 / math.sqrt(w.size(1))
        assert w.std().item() == pytest.approx(expected, rel=0.05), name


def test_what_is_learned_is_what_the_model_says_of_its_targets(train, monkeypatch):
    """Whoever edits GPT.forward learns from what it returns then."""
    first = column(train("as it is", *STILL, "--steps=1", "--warmup=0"), "loss")[0]
    forward = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda *args, **more: 2 * forward(*args, **more))
    twice = column(train("twice", *STILL, "--steps=1", "--warmup=0"), "loss")[0]
    assert twice == pytest.approx(2 * first)


def test_layers_of_your_own_are_drawn_by_the_seed(train, monkeypatch):
    class Mine(Block):
        def __init__(self, config, layer):
            super().__init__(config, layer)
            self.mine = torch.nn.Linear(config.n_embd, 3)

    monkeypatch.setattr("model.Block", Mine)
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(len(found) + 1)  # the stream of random numbers stands elsewhere each time
        run = train(name, *STILL, "--steps=1", "--warmup=0", "--weight_decay=0", f"--seed={seed}")
        weights = load_file(run / "step-00000001" / "model.safetensors")
        found.append(weights["blocks.0.mine.weight"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
