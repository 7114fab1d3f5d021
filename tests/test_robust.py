"""What changes prompts and embeddings leaves alone what it promises to."""

import numpy as np
import pytest
import torch

from dataset import IGNORE, Batch, layout
from model import GPT, GPTConfig
from robust import adversarial, augment, mistyped
from tokenizer import bytes_tokenizer

TOKENIZER = bytes_tokenizer().extended([])
SPECIAL = [*TOKENIZER.special.values()]


def batch(first: int = 0, rows: int = 40) -> Batch:
    """Windows of one row each: a prompt of 26 different letters, and an answer."""
    turns = [dict(role="user", content="abcdefghijklmnopqrstuvwxyz")]
    turns.append(dict(role="assistant", content="ABC"))
    ids = np.array([TOKENIZER.encode_row(turns)] * rows)
    x, y = ids[:, :-1], ids[:, 1:].copy()
    answer = np.flatnonzero(ids[0] == TOKENIZER.markers.assistant)[0]
    y[:, :answer] = IGNORE
    keys = [(1, number) for number in range(first, first + rows)]
    return Batch(x, y, *layout(x, TOKENIZER.markers, "causal"), keys)


def test_only_prompts_are_changed_and_about_as_often_as_asked():
    before = batch()
    after = augment(before, SPECIAL, 0.3)
    prompt = slice(1, 27)
    outside = np.ones(before.tokens.shape[1], bool)
    outside[prompt] = False
    assert (after.tokens[:, outside] == before.tokens[:, outside]).all()
    assert (after.targets == before.targets).all()
    hidden = before.mask[:, 0, -1] & ~after.mask[:, 0, -1]  # from the last position
    assert not hidden[:, outside].any()
    changed = (after.tokens != before.tokens)[:, prompt] | hidden[:, prompt]
    assert 0.2 < changed.mean() < 0.45  # an exchange changes two
    assert after.mask[:, 0].any(axis=-1).all()  # nobody sees nothing


def test_a_window_is_changed_alike_wherever_it_is_computed():
    whole, both = batch(100), slice(20, 40)
    after = augment(whole, SPECIAL, 0.3)
    half = augment(whole.windows(20, 40), SPECIAL, 0.3)
    assert (after.tokens[both] == half.tokens).all() and (after.mask[both] == half.mask).all()
    other = augment(batch(101), SPECIAL, 0.3)
    assert (after.tokens != other.tokens).any()


def test_about_as_many_letters_as_asked_are_mistyped_and_digits_stay():
    rng = np.random.default_rng(0)
    letters = rng.choice([*"abcdefghijklmnopqrstuvwxyz0123"], 4000)
    text = " ".join(letters)  # none has a neighbour to change places with
    wrong = mistyped(text, 0.2)
    assert wrong == mistyped(text, 0.2) and mistyped(text, 0) == text
    pairs = [*zip(letters, wrong.split(" "), strict=True)]
    assert all(a == b for a, b in pairs if a.isdigit())
    changed = [a != b for a, b in pairs if a.isalpha()]
    assert np.mean(changed) == pytest.approx(0.2 * 0.75, abs=0.02)
    assert {len(b) for _, b in pairs} == {0, 1, 2}
    assert sorted(mistyped("ab" * 200, 0.5)) != sorted("ab" * 200)
    assert "ba" in mistyped("ab " * 200, 0.5)


def test_noise_adds_copies_of_what_is_learned_and_of_nothing_else(tmp_path):
    import prepare
    from dataset import Dataset

    rows = [f"where is the cat number {i},answer{i}" for i in range(200)]
    (tmp_path / "rows.csv").write_text("q,a\n" + "\n".join(rows))
    argv = [str(tmp_path / "rows.csv"), "--prompt=q", "--answer=a", "--tokenizer=bytes"]
    prepare.main([*argv, f"--out={tmp_path / 'plain'}"])
    prepare.main([*argv, f"--out={tmp_path / 'noisy'}", "--noise=0.6"])
    plain, noisy = (Dataset(str(tmp_path / name)) for name in ("plain", "noisy"))
    for name in ("val", "test"):
        assert [*plain.split(name).rows()] == [*noisy.split(name).rows()]
    before, after = [*plain.split("train").rows()], [*noisy.split("train").rows()]
    assert after[::2] == before
    decoded = [noisy.tokenizer.decode_row(ids)[1] for ids in after]
    answers = [turns[-1]["content"] for turns in decoded]
    assert answers[::2] == answers[1::2]
    changed = [a[0] != b[0] for a, b in zip(decoded[::2], decoded[1::2], strict=True)]
    assert sum(changed) > 0.9 * len(changed)


def test_moved_embeddings_cost_more_and_no_gradient_is_left_over():
    model = GPT(GPTConfig(262, block_size=64, n_layer=2, n_head=2, n_embd=32, zero_init=False))
    model.init_weights(0)
    x, y, positions, mask = (torch.from_numpy(z) for z in batch(rows=4)[:4])

    def loss(embedded):
        logits = model.logits(model.trunk(x, mask, positions, embedded=embedded))
        return torch.nn.functional.cross_entropy(logits.mT, y, reduction="sum")

    plain = model(x, y, "sum", mask, positions)
    moved = adversarial(loss, model.wte(x), 1.0)
    assert moved > plain + 1e-3  # the mean of the plain loss and a higher one
    torch.testing.assert_close(adversarial(loss, model.wte(x), 0.0), plain)
    assert all(p.grad is None for p in model.parameters())
    moved.backward()
    assert all(p.grad is not None for p in model.parameters())
