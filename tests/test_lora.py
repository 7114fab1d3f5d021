"""LoRA: a base that stays as it is, a small adapter beside it, and one model of both in the end."""

import hashlib
import shutil

import pytest
import torch
from test_model import make, tokens
from test_train import rows

import lora
from engine import checkpoint, fast
from engine.checkpoint import load_model, load_weights

LORA = ["--lora_rank=4", "--lora_alpha=8", "--dropout=0.1", "--optimizer=adamw", "--lr=0.01"]


def adapted(name: str = "modern", on: str = "all", rows: int = 0, seed: int = 1):
    """A model whose weights are all drawn, with LoRA; and a copy without."""
    base = make(name)
    model = make(name)
    lora.add(model, 4, 8.0, on, rows, seed)
    return model, base


def learn_something(model) -> None:
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in lora.learned(model).values():
            p += 0.1 * torch.randn(p.shape, generator=g)


SHAPES = ["gpt2", "modern", "llama", "qwen3"]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("on", lora.MATRICES)
def test_at_first_the_model_is_the_base(name, on):
    model, base = adapted(name, on, rows=3)
    assert torch.equal(model(tokens()), base(tokens()))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("on, rows", [("all", 3), ("all+head", 3), ("all+head", 0)])
def test_merged_is_the_same_and_a_plain_model(name, on, rows):
    model, base = adapted(name, on, rows)
    learn_something(model)
    before = model(tokens())
    assert not torch.allclose(before, base(tokens()), atol=0.01)
    lora.merge(model)
    torch.testing.assert_close(model(tokens()), before, atol=1e-5, rtol=1e-5)
    assert [*model.state_dict()] == [*base.state_dict()]
    assert {type(m) for m in model.modules()} == {type(m) for m in base.modules()}
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("on", ["all", "all+head"])
def test_only_what_is_learned_gets_gradients_and_new_rows_are_the_last(on):
    model, base = adapted(on=on, rows=2)
    model(tokens(), tokens()).backward()
    names = {n for n, p in model.named_parameters() if p.grad is not None}
    assert names == set(lora.learned(model))
    ours = {name.rsplit(".", 1)[1] for name in names}
    assert ours == {"A", "B", "new"} and {"wte.new", "head.new"} <= names
    with torch.no_grad():
        model.wte.new += 1
        model.head.new += 1
    lora.merge(model)
    for table in ("wte.weight", "head.weight"):
        ours, theirs = model.state_dict()[table], base.state_dict()[table]
        assert torch.equal(ours[:-2], theirs[:-2])
        torch.testing.assert_close(ours[-2:], theirs[-2:] + 1)


@pytest.mark.parametrize("on", ["all", "all+head"])
def test_fast_parts_compute_the_same_with_it(on):
    model, _ = adapted(on=on, rows=2)
    learn_something(model)
    with torch.no_grad():
        before = model(tokens())
        fast.install(model, list(fast.PARTS))
        torch.testing.assert_close(model(tokens()), before, atol=1e-4, rtol=1e-4)


def test_another_seed_draws_another_a_and_the_same_seed_the_same():
    one, same, other = (adapted(seed=seed)[0].blocks[0].attn.wq for seed in (1, 1, 2))
    assert torch.equal(one.A, same.A) and not torch.equal(one.A, other.A)
    assert one.B.count_nonzero() == 0


def test_a_rank_that_saves_nothing_is_refused():
    with pytest.raises(ValueError, match="lora_rank=64 should be below"):
        lora.add(make("modern"), 64, 8.0, "qv", 0, 1)


# --- runs


def test_a_head_that_is_the_embedding_has_no_pair_beside_it(train):
    tied = train("tied", "--tied=true", "--steps=1")
    with pytest.raises(ValueError, match="lora_on='all[+]head' should be all: the head of this"):
        train("run", f"--init_from={tied}", "--lora_rank=4", "--lora_on=all+head")


@pytest.fixture
def base(train):
    return train("base", "--steps=4")


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_run_learns_and_its_base_stays(train, base, capsys):
    run = train("run", f"--init_from={base}", *LORA)
    said = capsys.readouterr().out
    assert "LoRA: 4,608 weights learn beside 41,024 (11.23%), in 0.1 MB instead of 0.5" in said
    losses = [row["val_loss"] for row in rows(run) if "val_loss" in row]
    first = [row["val_loss"] for row in rows(base) if "val_loss" in row][-1]
    assert losses[-1] < first
    model, _, _ = load_weights(run / checkpoint.name(8), merge=False)
    before, _ = load_model(str(base), "latest")
    assert lora.facts(model)["rank"] == 4
    assert all(torch.equal(p, before.state_dict()[n]) for n, p in lora.frozen(model).items())
    merged, tokenizer = load_model(str(run), "latest")
    assert lora.facts(merged) is None
    x = torch.tensor([tokenizer.encode("the model reads")])
    torch.testing.assert_close(merged(x), model.eval()(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(merged(x), before(x), atol=1e-3)


def test_a_checkpoint_is_small_and_the_base_is_stored_once(train, base):
    run = train("run", f"--init_from={base}", *LORA)
    full = sum(p.stat().st_size for p in (base / checkpoint.name(4)).glob("*.safetensors"))
    small = sum(p.stat().st_size for p in (run / checkpoint.name(8)).glob("*.safetensors"))
    assert small < full / 3
    assert not list(run.glob("*/model.safetensors"))
    names = {path.name for path in run.iterdir()}
    assert "base.safetensors" in names and not any("partial" in name for name in names)


@pytest.mark.parametrize("optimizer, on", [("adamw", "all"), ("muon", "all"), ("muon", "all+head")])
def test_interrupted_and_resumed_it_ends_in_the_same_bits(train, base, monkeypatch, optimizer, on):
    argv = [f"--init_from={base}", *LORA, f"--optimizer={optimizer}", f"--lora_on={on}"]
    whole = train("whole", *argv)

    class Killed(BaseException):
        pass

    def dies(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("train.evaluate", dies)
        with pytest.raises(Killed):
            train("parts", *argv)
    parts = train("parts", *argv)
    for file in ("adapter.safetensors", "optimizer.safetensors"):
        assert digest(parts / checkpoint.name(8) / file) == digest(
            whole / checkpoint.name(8) / file
        )
    assert digest(parts / "base.safetensors") == digest(whole / "base.safetensors")
    assert rows(parts) == rows(whole)


def test_what_a_killed_run_left_of_another_base_does_not_count(train, base):
    first = train("first", f"--init_from={base}", *LORA)
    run = train.folder / "run"
    run.mkdir()
    (run / "lock").touch()
    (run / "base.safetensors").write_bytes(b"of another beginning")
    (run / "base.safetensors.partial").write_bytes(b"half of it")
    train("run", f"--init_from={base}", *LORA)
    assert digest(run / "base.safetensors") == digest(first / "base.safetensors")
    assert not (run / "base.safetensors.partial").exists()


@pytest.mark.parametrize("damage, word", [("missing", "is missing"), ("changed", "sha256")])
def test_a_missing_or_changed_base_is_named_and_costs_no_checkpoint(train, base, damage, word):
    argv = [f"--init_from={base}", *LORA, "--eval_every=8", "--save_every=2"]
    run = train("run", *argv)
    file, before = run / "base.safetensors", {p.name for p in run.glob("step-*")}
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for use in (lambda: load_model(str(run)), lambda: train("run", *argv, "--steps=12")):
        with pytest.raises(ValueError, match=f"base.safetensors is .*{word}|{word}"):
            use()
    assert {p.name for p in run.glob("step-*")} == before
    file.write_bytes(content)
    train("run", *argv, "--steps=12")


def test_a_copied_run_folder_works_alone(train, base, tmp_path):
    run = train("run", f"--init_from={base}", *LORA)
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(run, copy)
    expected, tokenizer = load_model(str(run))
    shutil.rmtree(run)
    shutil.rmtree(base)
    model, _ = load_model(str(copy))
    x = torch.tensor([tokenizer.encode("the model reads")])
    assert torch.equal(model(x), expected(x))


def test_others_can_begin_with_the_merged_weights(train, base):
    run = train("run", f"--init_from={base}", *LORA)
    again = train("again", f"--init_from={run}", "--steps=4", "--lr=0", "--embed_lr=0",
                  "--head_lr=0")  # fmt: skip
    expected, _ = load_model(str(run))
    found, _ = load_model(str(again))
    assert all(torch.equal(p, found.state_dict()[n]) for n, p in expected.state_dict().items())


def test_export_merges(train, base, tmp_path):
    import huggingface

    run = train("run", f"--init_from={base}", *LORA)
    huggingface.main(["export", str(run), str(tmp_path / "hf")])
    huggingface.main(["import", str(tmp_path / "hf"), str(tmp_path / "back")])
    model, tokenizer = load_model(str(run))
    back, _ = load_model(str(tmp_path / "back"))
    x = torch.tensor([tokenizer.encode("the model reads")])
    torch.testing.assert_close(back(x), model(x), atol=1e-5, rtol=1e-5)


def test_other_settings_of_it_make_another_run(train, base):
    train("run", f"--init_from={base}", *LORA)
    with pytest.raises(ValueError, match="lora_rank was 4, is 8"):
        train("run", f"--init_from={base}", *LORA, "--lora_rank=8")


def test_it_needs_weights_to_begin_with(train):
    with pytest.raises(ValueError, match="lora_rank=4 should be 0 without --init_from"):
        train("run", *LORA)
