"""Weights of one run for another: vocabularies grow, ids never move."""

import json
import shutil

import pytest
import torch
from test_model import make, tokens

from engine.adopt import grow
from engine.checkpoint import load_model, load_weights
from tokenizer import Tokenizer


@pytest.fixture
def grown_data(data, tmp_path):
    """The data set of the tests, whose vocabulary has markers behind its last id."""
    folder = tmp_path / "grown"
    shutil.copytree(data, folder)
    tokenizer = Tokenizer.load(folder).extended(["translate"])
    tokenizer.save(folder)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    meta["tokenizer_sha256"] = tokenizer.digest()
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["gpt2", "modern", "llama"])
def test_new_rows_are_the_mean_and_old_logits_stay(name):
    model, before = make(name), make(name)
    grow(model, 5)
    x = tokens()
    assert model(x).shape[-1] == 66 == model.config.vocab_size
    torch.testing.assert_close(model(x)[..., :61], before(x), atol=1e-5, rtol=1e-5)
    tables = ["wte.weight"] if model.head.weight is None else ["wte.weight", "head.weight"]
    for table in tables:
        old, new = before.state_dict()[table], model.state_dict()[table]
        torch.testing.assert_close(new[61:], old.mean(0).expand(5, -1))
    assert [*model.state_dict()] == [*before.state_dict()]
    # a token that was never seen is no likelier than the likeliest, whatever stands before it
    assert (model(x)[..., 61:].amax(-1) <= before(x).amax(-1)).all()


@pytest.mark.parametrize("more", [[], ["--lora_rank=4"]])
def test_a_run_begins_with_weights_that_lack_the_markers(train, grown_data, capsys, more):
    base = train("base", "--steps=4")
    still = ["--lr=0", "--embed_lr=0", "--head_lr=0", "--steps=4"]
    run = train("run", f"--init_from={base}", *still, *more, data=grown_data)
    said = capsys.readouterr().out
    names = "<|user|>, <|assistant|>, <|system|>, <|end|>, <|translate|>"
    assert f"5 rows added for {names}: each begins as the mean of all tokens" in said
    before, theirs = load_model(str(base))
    model, ours = load_model(str(run))
    assert ours.extends(theirs) and model.config.vocab_size == 262
    x = torch.tensor([ours.encode("the model reads")])
    assert x.tolist() == [theirs.encode("the model reads")]  # ids never move
    torch.testing.assert_close(model(x)[..., :257], before(x), atol=1e-5, rtol=1e-5)


def test_new_rows_learn_beside_a_frozen_base(train, grown_data):
    base = train("base", "--steps=4")
    argv = [f"--init_from={base}", "--lora_rank=4", "--steps=4"]
    run = train("run", *argv, data=grown_data)
    model, _, _ = load_weights(run / "step-00000004", merge=False)
    assert model.wte.new.shape == model.head.new.shape == (5, 32)
    merged, _ = load_model(str(run))
    before, _ = load_model(str(base))
    assert torch.equal(merged.wte.weight[:257], before.wte.weight)
    assert torch.equal(merged.head.weight[:257], before.head.weight)
    # a token that no text holds has a gradient all the same, in the head: it should be unlikely
    assert not torch.equal(merged.head.weight[257:], before.head.weight.mean(0).expand(5, -1))


def test_the_mask_is_a_setting_of_the_run_and_not_of_the_weights(train, capsys):
    base = train("base", "--steps=4")
    run = train("run", f"--init_from={base}", "--mask=prefix", "--steps=4")
    assert "the shape is that of" not in capsys.readouterr().out
    assert load_model(str(run))[0].config.mask == "prefix"


def test_a_vocabulary_that_does_not_extend_is_refused_with_the_remedy(train, grown_data, text_file):
    import prepare

    other = train.folder / "other"
    prepare.main([str(text_file), f"--out={other}", "--vocab_size=300"])
    base = train("base", "--steps=4")
    with pytest.raises(ValueError, match=rf"reads bytes .*--tokenizer={base}"):
        train("run", f"--init_from={base}", data=other)
    grown = train("grown_run", "--steps=4", data=grown_data)
    with pytest.raises(ValueError, match="262 tokens"):  # a vocabulary never shrinks
        train("run", f"--init_from={grown}")
