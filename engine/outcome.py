"""What train.py prints of a run's end, and of the batch of a step."""

import shlex
from dataclasses import replace
from itertools import islice

import objectives
from dataset import Dataset
from engine.metrics import best_row

SHOWN = 3  # rows that are answered at the end


def show(model, data, s, run) -> None:
    """Prints how good the best checkpoint is, beside compressors, and what the model writes now."""
    import torch

    import chat
    import sample
    from evaluate import compressors

    run.stop.at_once = True  # all is saved
    objective = run.learner.objective
    if best := best_row(run.folder):
        loss = f"{best['val_loss']:.4f} {objective.unit}"
        print(f"\nbest validation loss: {loss}, at step {best['step']}")
        if best["val_bpb"]:
            others = compressors(data.split("val"))
            others = f" ({others})" if others else ""
            print(f"bits per byte of that text: {best['val_bpb']:.3f}{others}")
    torch.set_deterministic_debug_mode("default")  # picking a token has no such form on a GPU
    picked = sample.Settings(max_tokens=s.sample_tokens, seed=s.seed)
    if not objective.generates:
        print(f"\nnext: {objective.instead.replace('RUN', s.out)}")
        return
    tokens = 0 if s.shard else s.sample_tokens  # no process has the whole model
    limit = model.config.block_size
    if tokens and data.kind == "text":
        print("\na sample, by the weights of the last step:\n")
        ids = sample.read(s.sample_prompt, data.tokenizer, limit, picked)
        sample.write_samples(model.eval(), data.tokenizer, ids, picked, echo=s.sample_prompt)
    elif tokens:
        print("\nwhat the weights of the last step answer to rows that they have not seen:")
        for ids in islice(data.split("val").rows(), SHOWN):
            task, turns = data.tokenizer.decode_row(ids)
            turns = turns[:-1] if data.kind == "pairs" else turns  # of two answers leave one
            asked = replace(picked, task=task, chat=True, temperature=0)
            print(f"\n{turns[-2]['content']}\n> ", end="")
            ids = chat.recalled(turns[:-1], data.tokenizer, limit, asked)
            sample.write_samples(model.eval(), data.tokenizer, ids, asked)
    then = "--chat" if data.kind != "text" else f"--prompt={shlex.quote(s.sample_prompt)}"
    print(f"\nnext: python sample.py {s.out} {then}")


def show_batch(s) -> int:
    """Prints the windows that the update of step `s.show_batch` learns from, decoded."""
    Objective = objectives.find(s.objective).Objective
    data = Dataset(s.data, s.tokenizer, s.model.mask, s.train_on, s.mix, Objective.lines)
    objective = Objective(s, data.tokenizer)
    objective.require(data)
    split = data.split("train")
    split.require(s.model.block_size)
    B = s.batch_tokens // s.model.block_size
    batch = split.batch(s.show_batch - 1, B, s.model.block_size, s.seed)
    inputs, _ = next(objective.exercises(batch, None))
    for i, (_, number) in enumerate(batch.keys):
        print(f"--- step {s.show_batch}, window {number}\n{objective.shown(inputs, i)}")
    return 0
