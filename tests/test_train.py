"""Training: resumes to the same bits, is the same on two processes, and nothing disturbs it."""

import hashlib
import json
import math
import os
import signal
import time

import forked
import pytest
from conftest import TINY
from test_optim import OPTIMIZERS

from engine import checkpoint
from engine.metrics import read_metrics
from engine.resume import lock
from objectives.next_token import Objective
from optim import LossScale, learning_rate


def weights(run, step: int = 8) -> str:
    path = run / checkpoint.name(step) / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rows(run, *without: str) -> list[dict]:
    """The rows of a run, times aside."""
    drop = {"seconds", "tokens_per_second", *without}
    return [{k: v for k, v in row.items() if k not in drop} for row in read_metrics(run)]


def training(run) -> list[dict]:
    return [row for row in rows(run) if "loss" in row]


def test_rows_have_the_names_of_the_contract(train):
    run = train("run")
    (first, *_), last = training(run), read_metrics(run)[-1]
    assert list(read_metrics(run)[0]) == [
        *("step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds")
    ]
    assert list(last) == ["step", "val_loss", "val_bpb", "tokens", "seconds"]
    assert first["step"] == 1 and first["tokens"] == 256 and last["step"] == 8
    assert first["loss"] == pytest.approx(math.log(257), abs=1e-3)  # ln V: the head is zero
    assert last["val_bpb"] == pytest.approx(last["val_loss"] / math.log(2), rel=1e-2)  # bytes
    assert [row["step"] for row in training(run)] == list(range(1, 9))
    assert sorted(p.name for p in run.glob("step-*")) == ["step-00000004", "step-00000008"]


VARIANTS = {
    "muon": [],
    "adamw, dropout, accumulation": ["--optimizer=adamw", "--dropout=0.2", "--device_batch=2"],
    "nadamw, second epoch": ["--optimizer=nadamw", "--lr=1e-3", "--batch_tokens=8192"],
    "bfloat16, grouped heads": ["--dtype=bfloat16", "--n_kv_head=1"],
    "float16": ["--dtype=float16"],
}
TRIED = " ".join(sum(VARIANTS.values(), ["muon"]))  # and an optimizer that someone has added
VARIANTS |= {name: [f"--optimizer={name}"] for name in OPTIMIZERS if name not in TRIED}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_interrupted_run_resumes_to_the_same_bits(train, variant, monkeypatch):
    settings = VARIANTS[variant]
    whole = train("whole", *settings)

    class Killed(BaseException):
        pass

    def dies(*_):
        raise Killed

    with monkeypatch.context() as patch:  # after step 4 is saved, before it is evaluated
        patch.setattr("train.evaluate", dies)
        with pytest.raises(Killed):
            train("parts", *settings)
    with (train.folder / "parts" / "metrics.jsonl").open("a") as f:
        f.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')  # as a kill may leave it
    parts = train("parts", *settings)
    assert weights(parts) == weights(whole)
    assert rows(parts) == rows(whole)


def test_evaluation_logging_and_saving_never_change_training(train):
    often = train("often", "--eval_every=1", "--save_every=1", "--dropout=0.1")
    seldom = train("seldom", "--eval_every=8", "--save_every=8", "--log_every=8", "--dropout=0.1")
    assert weights(often) == weights(seldom)


def test_accumulation_equals_a_big_batch(train):
    big, small = train("big"), train("small", "--device_batch=3")  # 8 rows in 4 passes of 2
    for a, b in zip(training(big), training(small), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.cpu
def test_two_processes_train_as_one(train, data, tmp_path):
    settings = ["--dtype=float32", "--steps=20", "--eval_every=20"]
    one = train("one", *settings)
    argv = [tmp_path / "empty.py", f"--data={data}", f"--out={tmp_path / 'two'}", *TINY, *settings]
    forked.together(2, "train.py", *argv, "--device_batch=2")  # in two passes each
    two = tmp_path / "two"
    for a, b in zip(rows(one), rows(two), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], abs=1e-4), (key, a, b)


def test_training_learns(train):
    run = train("run", "--steps=150", "--eval_every=150", "--save_every=150")
    last = read_metrics(run)[-1]
    assert last["val_loss"] < 2.0 < math.log(257)


def test_a_loss_that_is_not_finite_stops_with_evidence(train, capsys, monkeypatch):
    train("run", "--steps=4")
    before = weights(train.folder / "run", 4)
    capsys.readouterr()
    monkeypatch.setattr(Objective, "loss", broken_loss)
    run = train("run", status=3)
    said = capsys.readouterr().out
    assert (
        "loss is nan" in said and "this update was not made" in said and "windows 32 to 39" in said
    )
    assert "step 4" in said
    assert weights(run, 4) == before and len(training(run)) == 4


def broken_loss(self, gpt, heads, tokens, *_):
    return [gpt(tokens).sum() * math.nan]


def test_float16_leaves_out_updates_that_overflow(train, monkeypatch):
    original = LossScale.__init__

    def much_too_large(self, dtype, state=None):
        original(self, dtype, state or [2.0**30, 0])

    monkeypatch.setattr(LossScale, "__init__", much_too_large)
    run = train("run", "--dtype=float16", "--steps=16", "--save_every=1", "--patience=0")
    norms = [row["grad_norm"] for row in training(run)]
    first = next(i for i, norm in enumerate(norms) if norm)
    assert first >= 2  # None where it overflowed, since JSON has no infinity
    assert all(0.1 < norm < 10 for norm in norms if norm)  # scaled back
    losses = [row["loss"] for row in training(run)]
    assert losses[: first + 1] == pytest.approx([math.log(257)] * (first + 1), abs=1e-5)
    assert losses[-1] < losses[0] - 0.05  # and learned from there on
    state = json.loads((run / checkpoint.name(16) / "state.json").read_text())
    good = norms[::-1].index(None)
    assert state["loss_scale"] == [2.0 ** (30 - norms.count(None)), good]


def test_a_finished_run_has_nothing_to_do_and_more_steps_continue_it(train, capsys):
    run = train("run")
    before = (run / "metrics.jsonl").read_bytes()
    train("run")
    assert "nothing to do" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_bytes() == before
    train("run", "--steps=12")
    out = capsys.readouterr().out
    assert "resumed from step 8" in out and "steps was 8, is 12" in out
    assert [row["step"] for row in training(run)] == list(range(1, 13))


def test_a_changed_setting_is_refused_with_both_values(train):
    train("run")
    with pytest.raises(ValueError, match="lr was 0.02, is 0.01"):
        train("run", "--lr=0.01")


def test_changed_data_are_refused(train, tmp_path):
    from conftest import make_text

    import prepare

    train("run")
    (tmp_path / "other.txt").write_text(make_text(seed=9), encoding="utf-8")
    prepare.main([str(tmp_path / "other.txt"), f"--out={tmp_path / 'other'}", "--tokenizer=bytes"])
    with pytest.raises(ValueError, match="digest"):
        train("run", "--steps=12", data=tmp_path / "other")


@pytest.mark.parametrize("damage", ["short", "flipped", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(train, damage, capsys):
    run = train("run")
    whole, before = weights(run), rows(run)
    path = run / "step-00000008" / "optimizer.safetensors"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.unlink() if damage == "missing" else path.write_bytes(
        raw[:-1] if damage == "short" else raw
    )
    train("run")
    out = capsys.readouterr().out
    assert "optimizer.safetensors" in out and "resumed from step 4" in out
    assert weights(run) == whole and (run / "step-00000008.corrupt").exists()
    assert rows(run) == before


def test_two_runs_in_one_folder_are_refused(train, tmp_path):
    with lock(tmp_path / "run"), pytest.raises(ValueError, match="another process"):
        train("run")


def test_sigterm_saves_and_exits_with_status_0(data, tmp_path, train):
    train("other", "--steps=1")  # writes empty.py
    argv = [tmp_path / "empty.py", f"--data={data}", f"--out={tmp_path / 'run'}", *TINY]
    process = forked.Forked("train.py", *argv, "--steps=100000")
    while not read_metrics(tmp_path / "run"):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert "the same command continues" in out
    assert checkpoint.newest(tmp_path / "run")[0] > 0


def test_init_from_begins_with_those_weights(train):
    first = train("first")
    second = train("second", f"--init_from={first}", "--lr=0", "--embed_lr=0", "--head_lr=0")
    assert weights(second) == weights(first)


def test_eval_only_changes_nothing(train, capsys):
    run = train("run")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    capsys.readouterr()
    train("run", "--eval_only", "--split=test")
    assert "nats a token" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_patience_ends_a_run_that_gets_no_better(train, capsys):
    still = ["--lr=0", "--embed_lr=0", "--head_lr=0", "--eval_every=1", "--patience=3"]
    run = train("run", *still)
    assert "stopped early" in capsys.readouterr().out
    assert [row["step"] for row in rows(run) if "val_loss" in row] == [1, 2, 3, 4]
    before = (run / "metrics.jsonl").read_bytes()
    train("run", *still)
    assert "nothing to do" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_bytes() == before


def test_the_speed_of_a_row_is_that_of_the_steps_since_the_row_before(train, monkeypatch):
    import train as script

    update, rest = script.update, 0.05
    monkeypatch.setattr(script, "update", lambda *a: (time.sleep(rest), update(*a))[1])
    found = [row for row in read_metrics(train("run", "--log_every=2")) if "loss" in row]
    assert [row["step"] for row in found] == [1, 2, 4, 6, 8]
    assert all(0 < row["tokens_per_second"] <= 256 / rest for row in found)


def test_learning_rate_is_tied_to_the_number_of_steps():
    linear = [learning_rate(i, 10, 0.2, 0.5, 0.1, "linear") for i in range(10)]
    assert linear == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 0.82, 0.64, 0.46, 0.28])
    cosine = [learning_rate(i, 2000, 100, 1.0, 0.1, "cosine") for i in (0, 99, 100, 1050, 1999)]
    assert cosine == pytest.approx([1 / 101, 100 / 101, 1, 0.55, 0.1], abs=1e-5)


# --- what may change, what is said, what older folders lack


def test_what_changes_bits_but_not_the_run_is_said_aloud(train, capsys, threads_in_name):
    run = train("run", "--steps=4", "--deterministic=false")
    capsys.readouterr()
    changed = ["--dtype=bfloat16", "--device_batch=2", "--deterministic", "--threads=2"]
    train("run", *changed)
    said = capsys.readouterr().out
    assert "resumed from step 4" in said
    for change in (
        "dtype was torch.float32, is torch.bfloat16",
        "device_batch was 0, is 2",
        "deterministic was False, is True",
        "threads was 1, is 2",
    ):
        assert f"{change}: the same data, but not the same bits" in said
    assert [row["step"] for row in training(run)] == list(range(1, 9))


def test_a_longer_context_for_weights_that_were_trained_before(train, capsys):
    rotary = train("rotary")
    longer = train("longer", f"--init_from={rotary}", "--block_size=64")
    model, _ = checkpoint.load_model(str(longer))
    assert model.config.block_size == 64
    learned = train("learned", "--position=learned")
    with pytest.raises(ValueError, match="--block_size=32 or less"):
        train("other", f"--init_from={learned}", "--block_size=64")


def test_a_checkpoint_in_out_wins_over_init_from_and_that_is_said(train, capsys):
    first = train("first", "--lr=0.01")
    train("run", "--steps=4", "--decay=0")
    capsys.readouterr()
    run = train("run", f"--init_from={first}", "--decay=0")
    assert f"init_from='{first}' is not read again" in capsys.readouterr().out
    assert weights(run) == weights(train("whole", "--decay=0"))


def interrupted(train, name: str, monkeypatch, *settings: str):
    """A run that is asked to stop while it makes step 3."""
    from engine.run import Run

    count = Run.count

    def ask(run, step):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        count(run, step)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "count", ask)
        return train(name, *settings)


def test_the_command_that_continues_is_the_one_that_is_told(train, capsys, monkeypatch):
    interrupted(train, "run", monkeypatch, "--log_every=1")
    assert "after step 3, which is saved; the same command continues" in capsys.readouterr().out
    interrupted(train, "run", monkeypatch, "--log_every=1", "--fresh")
    assert "the same command without --fresh continues" in capsys.readouterr().out
    run = train("run")
    assert "resumed from step 3" in capsys.readouterr().out
    assert weights(run) == weights(train("whole"))


def test_a_checkpoint_that_lacks_newer_settings_continues(train):
    run, whole = train("run", "--steps=4", "--decay=0"), train("whole", "--decay=0")
    path = run / checkpoint.name(4)
    state = json.loads((path / "state.json").read_text())
    for name in ("zero_init", "qkv_bias", "rope_factor", "rope_original"):
        del state["model"][name]
        del state["settings"][name]
    for name in ("threads", "eval_tokens"):
        del state["settings"][name]
    for name in ("device_batch", "deterministic"):
        del state["machine"][name]
    state["settings"] |= dict(n_kv_head=0, head_dim=0, mlp_dim=0)  # once stored as they were given
    (path / "state.json").write_text(json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_text())
    digest = hashlib.sha256((path / "state.json").read_bytes()).hexdigest()
    manifest["state.json"] = dict(size=(path / "state.json").stat().st_size, sha256=digest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    train("run", "--decay=0")
    assert weights(run) == weights(whole)


def test_all_files_of_a_checkpoint_can_be_read_by_whoever_can_read_one(train):
    path = train("run") / checkpoint.name(8)
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1


def test_a_checkpoint_is_found_by_its_number(train):
    run = str(train("run"))
    assert checkpoint.find(run, "4") == checkpoint.find(run, "step-00000004")


def test_the_closed_form_counts_the_parameters_but_for_norms_and_biases():
    from model import GPT, GPTConfig

    shapes = [{}, dict(tied=True, position="learned"), dict(mlp="swiglu", n_kv_head=2, head_dim=10)]
    for shape in shapes:
        config = GPTConfig(61, block_size=24, **shape)
        assert config.parameters() == GPT(config).num_parameters()
