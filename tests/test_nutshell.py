"""nutshell.py: one page that is what it says."""

import forked
import pytest
import torch

import nutshell
from model import GPT, GPTConfig


@pytest.fixture
def small(monkeypatch):
    for name, value in dict(
        BATCH=4, CONTEXT=16, WIDTH=32, HEADS=2, LAYERS=2, STEPS=40, RATE=0.02
    ).items():
        monkeypatch.setattr(nutshell, name, value)
    torch.manual_seed(1)


def twin(ours: torch.nn.Module) -> GPT:
    """The network of model.py of the same shape, with the same weights under the same names."""
    parts = dict(embed_norm=False, logit_cap=0)  # the only parts that differ from the defaults
    shape = dict(n_layer=nutshell.LAYERS, n_head=nutshell.HEADS, n_embd=nutshell.WIDTH)
    theirs = GPT(GPTConfig(256, block_size=nutshell.CONTEXT, **shape, **parts))
    theirs.load_state_dict(ours.state_dict())
    return theirs


def test_model_py_gives_the_same_scores_and_the_same_loss(small):
    ours = nutshell.GPT()
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.3)  # none is zero, which would hide a difference
    theirs = twin(ours)
    x, y = nutshell.batch_of(torch.randint(256, (1000,)))
    assert (x[:, 1:] == y[:, :-1]).all()
    with torch.no_grad():
        for T in (nutshell.CONTEXT, 5):  # a whole window, and a shorter one
            scores, nats = theirs(x[:, :T]), theirs(x[:, :T], y[:, :T])
            assert torch.allclose(ours(x[:, :T]), scores, atol=1e-4)
            assert nutshell.loss_of(ours, x[:, :T], y[:, :T]).item() == pytest.approx(nats.item())


def test_it_learns_and_writes(small, tmp_path, capsys):
    (tmp_path / "abc.txt").write_text("abcdefghij\n" * 200)
    nutshell.main([str(tmp_path / "abc.txt"), "--prompt=efg"])
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    nats = [float(line.split()[7]) for line in lines]
    assert len(nats) == 2 and nats[0] == 5.55  # ln 256
    assert nats[1] < 0.5
    assert "\nefghij\nabcdefghij\nabcdefghij\n" in out


def test_it_goes_on_from_a_prompt_that_is_no_text(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(nutshell, "STEPS", 0)
    (tmp_path / "abc.txt").write_text("abcdefghij\n" * 200)
    nutshell.main([str(tmp_path / "abc.txt"), "--prompt=\udcffx"])  # a byte that is no UTF-8
    assert "\ufffdx" in capsys.readouterr().out


def test_each_step_follows_the_gradient_of_its_own_batch(small, tmp_path, monkeypatch):
    (tmp_path / "abc.txt").write_text("abcdefghij\n" * 200)
    x, y = nutshell.batch_of(torch.randint(256, (1000,)))
    monkeypatch.setattr(nutshell, "RATE", 0.0)  # no weight changes, so the gradient does not either
    monkeypatch.setattr(nutshell, "batch_of", lambda _: (x, y))
    seen, step = [], torch.optim.Adam.step

    def noted(optimizer):
        seen.append(optimizer.param_groups[0]["params"][-1].grad.clone())
        step(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    nutshell.main([str(tmp_path / "abc.txt")])
    assert len(seen) == 40 and seen[0].any()
    assert all(torch.allclose(grad, seen[0]) for grad in seen)


@pytest.mark.parametrize("size", [None, 100])
def test_a_file_that_is_missing_or_too_short_gets_a_sentence(tmp_path, size):
    path = tmp_path / "short.txt"
    if size:
        path.write_bytes(b"a" * size)
    _, said = forked.run("nutshell.py", path, status=2).splitlines()  # behind how to call it
    assert ("short.txt cannot be read" if size is None else "100 bytes of text") in said
