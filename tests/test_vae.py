"""The variational autoencoder: its loss by hand, what reads what, and whether its code is used."""

import math

import numpy as np
import promises
import pytest
import torch

import latent
import prepare
from dataset import IGNORE
from objectives import vae

SIZE = ["--block_size=48", "--batch_tokens=384"]  # eight lines of a batch
ARGV = ["--objective=vae", "--encoder_layers=1", *SIZE]


@pytest.fixture(scope="module")
def lines(tmp_path_factory, text_file):
    """The same text, a sentence a document."""
    out = tmp_path_factory.mktemp("data") / "lines"
    prepare.main([str(text_file), f"--out={out}", "--tokenizer=bytes", "--lines=true"])
    return out


@pytest.fixture
def made(lines):
    return promises.make(lines, *ARGV)


def inputs_of(learner, batch):
    return promises.tensors(learner.objective.prepare(batch, learner)[0])


def says(learner, mean: float, numbers: int, logvar: float = 0.0) -> None:
    """Makes the encoder say this of the first `numbers` of every code, and nothing of the rest."""
    Z = learner.objective.own.latent
    with torch.no_grad():
        learner.heads["posterior"].bias[:numbers] = mean
        learner.heads["posterior"].bias[Z : Z + numbers] = logvar


def wake(learner) -> None:
    """Weights without the zeros that they begin with, so that everything depends on everything."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in learner.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))


def test_the_loss_begins_at_t_ln_v_a_sentence_and_the_kl_at_0(made):
    batch = made[1]
    found = promises.means(*made)
    tokens = (batch.targets != IGNORE).sum() / len(batch.tokens)
    assert tokens > 20
    assert found["total"] == pytest.approx(tokens * math.log(257), rel=1e-4)
    assert found["reconstruction"] == pytest.approx(found["total"])
    assert found["kl"] == 0


def test_the_kl_is_that_of_two_normal_distributions(made):
    says(made[0], mean=0.7, numbers=3, logvar=-0.5)
    q = torch.distributions.Normal(0.7, math.exp(-0.25))
    expected = 3 * torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    found = promises.means(*made)
    assert found["kl"] == pytest.approx(float(expected), rel=1e-5)
    assert found["total"] == pytest.approx(found["reconstruction"] + found["kl"], rel=1e-5)


def test_in_training_a_number_costs_beta_and_at_least_its_free_bits(lines):
    learner, batch = promises.make(lines, *ARGV, "--cycles=0", "--word_dropout=0")
    says(learner, mean=1.0, numbers=2)  # of 32: 1/2 nat each
    learner.train()
    *inputs, beta = inputs_of(learner, batch)
    assert (beta == 1).all()
    with torch.no_grad():
        free, half = (learner(*inputs, beta * factor) for factor in (1, 0.5))
    assert float(free[2]) == pytest.approx(8 * 2 * 0.5, rel=1e-5)
    cost = 8 * (2 * 0.5 + 30 * 0.15)
    assert float(free[0] - free[1]) == pytest.approx(cost, rel=1e-3)
    assert float(half[0] - half[1]) == pytest.approx(cost / 2, rel=1e-3)


def test_beta_rises_in_the_first_half_of_each_cycle(lines):
    learner, batch = promises.make(lines, *ARGV, "--steps=80", "--cycles=2")
    beta = learner.objective.beta
    assert [beta(step) for step in (0, 10, 20, 39, 40, 50, 60, 79)] == [0, 0.5, 1, 1] * 2
    many = [(1, 8 * 10 + i) for i in range(8)]  # the keys of the batch of step 10
    assert (inputs_of(learner, batch._replace(keys=many))[-1] == 0.5).all()


def test_evaluation_knows_neither_beta_nor_free_bits_nor_hidden_tokens(lines):
    made = [promises.make(lines, *ARGV, *more) for more in ((), ("--word_dropout=0.9",))]
    for learner, *_ in made:
        wake(learner)
    a, b = (promises.means(*each) for each in made)
    assert a == b
    assert a["total"] == pytest.approx(a["reconstruction"] + a["kl"], rel=1e-5)


def test_hidden_tokens_are_not_read_and_no_decoder_looks_ahead(made):
    learner, batch = made
    wake(learner)
    tokens, _, noise, hidden, _ = inputs_of(learner, batch)
    gpt, heads = learner.gpt, learner.heads
    assert 0.02 < hidden[:, 1:].float().mean() < 0.2 and not hidden[:, 0].any()

    def seen(ids, z=noise, hidden=None):
        with torch.no_grad():
            return gpt.trunk(ids, embedded=vae.read(gpt, heads, ids, z, hidden=hidden))

    other = torch.where(hidden, (tokens + 7) % 256, tokens)
    assert torch.equal(seen(tokens, hidden=hidden), seen(other, hidden=hidden))
    other = tokens.clone()
    other[:, 5:] = 7
    assert torch.allclose(seen(tokens)[:, :5], seen(other)[:, :5], atol=1e-6)
    changed = (seen(tokens) - seen(tokens, noise + 1)).abs().amax(dim=(0, 2))
    assert (changed > 1e-3).all()  # the code is read at every position


def test_a_code_depends_on_all_of_its_sentence_and_on_nothing_behind_it(made):
    learner = made[0]
    wake(learner)
    lines = [[97, 98, 99], [100] * 20]

    def mean(lines):
        with torch.no_grad():
            return vae.posterior(learner.gpt, learner.heads, *latent.padded(lines, 256))[0]

    beside, alone = mean(lines), mean(lines[:1])
    assert torch.allclose(beside[0], alone[0], atol=1e-5)
    for i in range(3):
        changed = [*lines[0]]
        changed[i] = 120
        assert (mean([changed])[0] - alone[0]).abs().max() > 1e-3


def test_lines_that_fill_up_an_evaluation_are_no_sentences(made):
    learner, batch = made
    wake(learner)
    learner.eval()
    nothing = batch._replace(
        tokens=np.concatenate([batch.tokens, 0 * batch.tokens[:2]]),
        targets=np.concatenate([batch.targets, np.full_like(batch.targets[:2], IGNORE)]),
        keys=[*batch.keys, (0, 1), (0, 2)],
    )
    found = []
    for some in (batch, nothing):
        inputs, counts = learner.objective.prepare(some, learner)
        with torch.no_grad():
            found.append([*map(float, learner(*promises.tensors(inputs))), *counts])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0][-1] == 8


def test_without_a_code_it_is_a_language_model(lines):
    learner, batch = promises.make(lines, *ARGV, "--latent=0", "--word_dropout=0")
    assert not learner.heads
    wake(learner)
    found = promises.means(learner, batch)
    with torch.no_grad():
        tokens, targets = promises.tensors(batch[:2])
        nats = float(learner.gpt(tokens, targets, "sum")) / len(tokens)
    assert found["total"] == pytest.approx(nats, rel=1e-5) and found["kl"] == 0


def test_importance_weighting_finds_the_likelihood_where_the_bound_is_far(lines):
    """With a head that is zero p(x|z) is the same for every z, and so is p(x)."""
    learner = promises.make(lines, *ARGV, "--latent=2")[0]
    says(learner, mean=1.0, numbers=2)
    with torch.no_grad():
        found = latent.measured(
            learner.eval(), learner.objective.tokenizer, [[97] * 9] * 2, samples=1000, seed=1
        )
    nats = 10 * math.log(257)  # nine tokens and the end
    assert found["reconstruction"] + found["kl"] == pytest.approx(np.full(2, nats + 1), rel=1e-4)
    assert found["weighted"] == pytest.approx(np.full(2, nats), abs=0.2)
    assert found["exchanged"] == pytest.approx(np.full(2, nats), rel=1e-4)
    assert found["mean"].shape == (2, 2)


def test_it_keeps_the_promises_of_all(train, lines, made, capsys, tmp_path):
    promises.shared_out_alike(*made)
    run = promises.resumes(train, lines, *ARGV)
    said = promises.evaluates(run, capsys)
    assert "nats a sentence" in said and "kl" in said
    promises.is_exported(run, tmp_path / "exported")

    def command(*argv: str) -> list[str]:
        capsys.readouterr()
        latent.main([str(run), *argv])
        return capsys.readouterr().out.splitlines()

    a, b = "the loss reads the corpus.", "nobody draws gradients."
    assert len(command("--from_prior=3", "--temperature=1")) >= 3
    way = command(f"--between={a}", f"--and={b}")
    assert way[: len(way) // 7] == command(f"--reconstruct={a}")
    report = command("--report", "--sentences=9", "--samples=3", "--split=test")
    assert " on 9 sentences of the test split" in report[0] and len(report) == 7
    assert "active units 0 of 32" in report[-2]  # eight steps are not enough
    with pytest.raises(ValueError, match="given together with --and"):
        latent.main([str(run), "--between=a"])
    with pytest.raises(ValueError, match="one thing at a time"):
        latent.main([str(run), "--report", "--from_prior=2"])
    with pytest.raises(ValueError, match="has 60 tokens"):
        latent.main([str(run), f"--reconstruct={'a' * 60}"])

    import sample

    with pytest.raises(ValueError, match="--from_prior"):
        sample.main([str(run)])


def test_one_batch_is_learned_by_heart_and_its_codes_are_used(made):
    learner, batch = made
    begun = promises.means(*made)["total"]
    lines = [ids[:12] for ids in batch.tokens[:, 1:].tolist()]

    def exchanged():
        with torch.no_grad():
            found = latent.measured(learner.eval(), learner.objective.tokenizer, lines, 2, 1)
        return (found["exchanged"] - found["reconstruction"]).mean()

    assert exchanged() == 0  # a head that is zero hears nothing
    assert promises.learns_by_heart(learner, batch, steps=80) < 0.3 * begun
    assert exchanged() > 2


def test_texts_that_are_no_sentences_are_refused(data):
    with pytest.raises(ValueError, match="--lines=true"):
        promises.make(data, *ARGV)
