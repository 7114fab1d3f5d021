"""Training: python train.py config/small.py --steps=500

A model learns from text by predicting each next token, and being corrected. At its plainest:

    for step in range(steps):
        start = random.randrange(len(tokens) - T)     # tokens: the whole text as numbers, (N)
        x = tokens[None, start : start + T]           # (1, T)
        y = tokens[None, start + 1 : start + T + 1]   # (1, T): after each, the one that comes next
        loss = model(x, y)                            # how surprised the model is
        loss.backward()                               # how each weight would change that: p.grad
        with torch.no_grad():
            for p in model.parameters():
                p -= rate * p.grad                    # a small step downhill
                p.grad = None

Read the settings later, when a line uses them. `update` is the inside of that loop, with a batch
too large for memory, several machines and 16-bit numbers thought of; `train` is the loop, with all
windows in random order, a rate that rises and falls (optim.py), and a log. It runs as one
process, or as several under torchrun, here on the eight GPUs of one machine:

    torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py

Interrupted, it continues where its newest checkpoint stands, when the same command is given again.
"""

import math
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Literal

import objectives
from engine import outcome, preflight, settings
from engine.settings import BelowOne, Bound, Count, CountOrAuto, Fraction, NotNegative, Positive
from engine.stop import Stop
from shape import GPTConfig

START = time.monotonic()  # of the command: s.minutes counts from here
Name = Annotated[str, Bound(f"one of {', '.join(objectives.names())}", objectives.find)]
Rate = Annotated[float, Bound("from 0 to 1000", lambda x: 0 <= x <= 1000)]


@dataclass
class Settings:
    config: str = "config/small.py"  # file of settings; the command line overrides it

    # what goes in and out
    data: str = "data/python"  # folders of prepare.py, as in a,b; data/python is made if missing
    tokenizer: str = ""  # vocabulary of a folder of public shards, which has no meta.json
    out: str = ""  # folder of the run; by default out/<name of the config file>
    init_from: str = ""  # begin with the weights of this run or checkpoint
    seed: Count = 1  # of weights, order of the data, dropout
    objective: Name = "next_token"  # what is learned: a file in objectives/, with its settings

    # the model: n_layer, n_embd and the others stand in shape.py; vocab_size is that of the data
    model: GPTConfig = field(default_factory=partial(GPTConfig, vocab_size=0))

    # the optimization; why these rates, and why three: make_optimizers in optim.py
    steps: Positive = 1000  # updates
    minutes: NotNegative = 0.0  # as many as fit into that time, 60 updates at least; 0: all steps
    batch_tokens: Positive = 8192  # tokens in one update, over all processes
    device_batch: CountOrAuto = 0  # most windows in a pass, which bounds memory; 0 is no bound
    optimizer: Literal["muon", "adamw", "nadamw"] = "muon"  # muon has AdamW for embeddings and head
    lr: Rate = 0.02  # of the matrices; with adamw of everything, and about 0.001 is right
    embed_lr: Rate = 0.3  # of the embeddings, with muon, relative to the size they begin with
    head_lr: Rate = 0.004  # of the head, biases and norm weights, with muon
    warmup: NotNegative = 0.0  # steps of linear rise; below 1: a fraction of them, 1 is one step
    decay: Fraction = 0.6  # last fraction of the steps, in which the rate falls
    schedule: Literal["linear", "cosine"] = "linear"  # the shape of the fall
    final_lr: Fraction = 0.0  # where it ends, as a fraction of lr
    momentum: BelowOne = 0.95  # of muon: how much of the last direction is kept
    beta1: BelowOne = 0.8  # of AdamW: decay of the mean gradient
    beta2: BelowOne = 0.95  # of AdamW: decay of the mean squared gradient
    weight_decay: NotNegative = 0.0  # of matrices; not of embeddings and head with muon
    grad_clip: NotNegative = 1.0  # largest norm of the gradient; 0 is no bound

    # what is kept and shown; the last step is always saved and evaluated
    log_every: Positive = 10  # steps between rows of metrics.jsonl, which begins with step 1
    eval_every: Positive = 500  # steps between evaluations on the validation split
    eval_tokens: Count = 0  # tokens of it to evaluate on, evenly spread; 0 is all
    save_every: Positive = 500  # steps between checkpoints
    patience: Count = 0  # stop after this many evaluations without a better one; 0 is never
    sample_tokens: Count = 200  # length of the sample at the end
    sample_prompt: str = ""  # its beginning
    tensorboard: bool = False  # also log to TensorBoard, in the folder of the run
    wandb: str = ""  # also log to this project of Weights & Biases

    # the machine
    device: settings.Device = "auto"  # auto, cpu, mps, cuda, or one GPU such as cuda:1
    dtype: settings.DType = "auto"  # of matrix products
    compile: settings.Compile = "auto"  # whether torch.compile makes kernels for this very model
    threads: settings.Threads = "auto"  # of a CPU: a number, or chosen by the size of the work
    fast: bool = True  # parts that compute the same as model.py, faster; false runs model.py itself
    deterministic: bool = False  # equal bits in every run on a GPU too, more slowly
    shard: bool = False  # several processes: each keeps a part of weights, gradients and moments
    checkpoint_activations: bool = False  # compute blocks again backward: less memory, more time

    # rarely needed: what is learned from rows (questions with answers and the like)
    train_on: Literal["answers", "all"] = "answers"  # all: prompts, too, as GPT-1 did beside labels
    mix: str = ""  # how often each task: by size, temperature=2, or sums=0.5,text=0.2
    lora_rank: Count = 0  # with init_from: learn matrices of this rank beside frozen ones; 0 is off
    lora_alpha: NotNegative = 16.0  # they count lora_alpha / lora_rank: see lora.py
    lora_on: Literal["qv", "attention", "all", "all+head"] = "all"  # which have some beside them

    # another beginning, or something else than training
    fresh: bool = False  # move what is in out aside and begin anew
    show_batch: Count = 0  # print what the update of this step learns from
    eval_only: bool = False  # evaluate the best checkpoint of the run and change nothing
    split: Literal["train", "val", "test"] = "val"  # which split eval_only takes


# --- one step, and the loop


def update(learner, optimizers, scale, exercise: tuple, step: int, s: Settings, here):
    """One step of learning: returns the batch's mean loss before it, in nats, and the norm of its
    gradient. A norm that is not finite means that float16 overflowed and the step was skipped.

        tokens   the cat sat on        as numbers, (B, T)
        targets  cat sat on the        at each position the token that comes next; -100: no target

    In one pass, in one process, in 32 bits, it is

        loss = model(tokens, targets)
        loss.backward()
        if s.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()

    `learner` is the model, under the objective that says what its loss is; `exercise` is what it
    has made of this process's share of the batch: arrays such as the two above, and how many
    targets they hold (objectives/__init__.py). `here` is where it is computed: the device, its type
    of numbers, and the other processes. `scale.value` is 1 but for float16, see optim.py. Raises
    FloatingPointError, with no weight changed, if loss or gradient are not finite and a smaller
    scale is no remedy.
    """
    import torch  # takes a second to load, so bad settings are reported before it

    from engine import machine
    from engine.learner import total

    # how many targets the batch has, in all processes. The loss is their mean: each pass below
    # gives a sum, divided by this number. A mean of means would weigh some targets more
    inputs, counts = exercise
    counts = here.sum(counts)
    mean_loss = torch.zeros((), device=here.device)
    share = len(inputs[0])
    per_pass = windows_in_a_pass(share, s)
    # 1. forward, and backward: by the chain rule, from the loss back to the first layer, how much
    # the loss would change with each weight: p.grad. A batch too large for memory is taken in
    # passes of some windows: backward() adds to the p.grad that is there (gradient accumulation)
    for i in range(0, share, per_pass):
        machine.seed(s.seed, step, here.rank, i)  # of dropout: a run that is resumed drops the same
        # processes hold equal weights and learn from different windows (DDP). While the last
        # backward pass runs, their gradients are summed, since each loss is divided by all targets
        # already: then all make the same update
        here.gradients.active = i + per_pass == share
        windows = [None if z is None else here.put(z[i : i + per_pass]) for z in inputs]
        # autocast: matrix products, forward and backward, are in 16 bits where the hardware is
        # faster so; weights, p.grad and the optimizer's sums stay in 32, where a small update to a
        # large number is not rounded away (arXiv:1710.03740)
        with here.autocast():
            # sums over all targets of this pass, one for each term of the objective: next_token
            # has [model(tokens, targets, "sum")]
            sums = learner(*windows)
        loss = total(learner.objective, sums, counts)  # next_token: sums[0] / counts[0]
        (loss * scale.value).backward()  # float16 would round small gradients to zero
        mean_loss += loss.detach()
    here.gradients.wait()
    scale.unscale(learner.parameters())  # before clipping, which must see the true gradient
    # 2. clipping: a gradient longer than grad_clip is shortened, its direction kept, so that one
    # odd batch does not outweigh all others in the optimizers' running means (arXiv:1211.5063)
    norm = torch.nn.utils.clip_grad_norm_(learner.parameters(), s.grad_clip or math.inf).item()
    # 3. the step itself, unless there is nothing sound to follow
    (mean,) = here.sum([mean_loss.item()])  # of all processes
    finite = math.isfinite(mean) and math.isfinite(norm)
    if not math.isfinite(mean) or (not finite and scale.value == 1):
        raise FloatingPointError(f"its loss is {mean} and its gradient norm {norm}")
    if finite:
        for optimizer in optimizers:
            optimizer.step()
    scale.update(finite)
    learner.zero_grad(set_to_none=True)
    return mean, norm


def train(s: Settings, stop: Stop) -> int:
    """Trains a model, from the beginning or from where its run stands; returns the exit status.

    Steps are counted from 1, their batches from 0. Batch 999 is a function of the number and the
    seed, and needs no memory of those before: so a run that is resumed takes the same batches. A
    loss that is not finite ends the run with a message. Of what `run` does, this matters here:

        if step % log_every == 0:   print(loss)                          a row of metrics.jsonl
        if step % save_every == 0:  save(model, optimizers, step)        a checkpoint
        if step % eval_every == 0:  print(evaluate(model, val_split))    no dropout, no gradient

    and all three after the last step. Where a signal asks it to stop, `save` saves, and it ends.
    """
    from engine import machine
    from optim import learning_rate, set_rates

    here, data, objective, run = set_up(s, stop)
    learner, optimizers, scale = make_learner(s, stop, here, data, objective, run)
    if run.finished():
        return 0
    split, T = data.split("train"), s.model.block_size
    B = s.batch_tokens // T  # windows in a batch, of which each process has its share
    if here.compile:
        some = split.batch(0, B, T, s.seed).windows(0, windows_in_a_pass(B // here.world, s))
        machine.compile(learner, here, objective.prepare(some, learner)[0])
    with run:
        for step in run.steps():
            factor = learning_rate(step - 1, s.steps, s.warmup, s.decay, s.final_lr, s.schedule)
            set_rates(optimizers, factor)
            batch = split.batch(step - 1, B, T, s.seed, here.rank, here.world)
            for exercise in objective.exercises(batch, learner):  # one, as a rule
                loss, norm = update(learner, optimizers, scale, exercise, step, s, here)
            run.log(step, loss, s.lr * factor, norm)
            run.save(step)
            run.evaluate(step)
    if run.completed and here.rank == 0:
        outcome.show(learner.gpt, data, s, run)
    return run.status


# --- what the loop begins with: skip it on a first reading


def set_up(s: Settings, stop: Stop) -> tuple:
    """Where it is computed; what there is to learn from, and what is learned; the run's folder."""
    from dataset import Dataset
    from engine import machine
    from engine.run import Run

    Objective = objectives.find(s.objective).Objective
    here = machine.pick(s.device, s.dtype, s.compile if Objective.compiles else "false")
    machine.start(here, s.deterministic)
    data = Dataset(s.data, s.tokenizer, s.model.mask, s.train_on, s.mix, Objective.lines)
    objective = Objective(s, data.tokenizer)
    objective.require(data)
    run = Run(s, here, stop, START)
    T = s.model.block_size
    data.split("train").require(T)
    if next(data.split("val").in_order(1, T), None) is None:
        raise ValueError(f"no answer in the val split of {s.data} fits block_size={T}: use more")
    return here, data, objective, run


def make_learner(s: Settings, stop: Stop, here, data, objective, run) -> tuple:
    """The model with what its objective adds to it, its optimizers, and the scale of the loss: new,
    or as the newest checkpoint of the run has them. Opens the run's log."""
    from engine import memory
    from engine.adopt import adopt_heads
    from engine.learner import Learner
    from evaluate import evaluate
    from optim import LossScale, make_optimizers

    model = run.load_model() if run.step else new_model(s, data, here)
    learner = Learner(model, objective)
    if s.init_from and not run.step:
        adopt_heads(s.init_from, learner, here.say)
    T = s.model.block_size
    B = s.batch_tokens // T
    run.make_ready(learner, windows_in_a_pass(B // here.world, s))
    if s.device_batch == "auto":
        batch = data.split("train").batch(0, B, T, s.seed, here.rank, here.world)
        s.device_batch = memory.device_batch(learner, batch, here, run.state["machine"])
    optimizers = make_optimizers(learner, s, here.dtype)
    scale = LossScale(here.dtype, run.state["loss_scale"])
    if s.optimizer != "muon" and s.lr > 0.01:
        here.say(f"lr={s.lr:g} is a rate for muon: {s.optimizer} wants about 0.001")
    held_out = data.split("val")
    validate = partial(evaluate, learner, held_out, here, stop, s.device_batch, s.eval_tokens)
    run.begin(data, learner, optimizers, scale, validate)
    return learner, optimizers, scale


def new_model(s: Settings, data, here):
    """A model with random weights, or with those of the checkpoint `init_from` (fine-tuning)."""
    import lora
    from engine.adopt import adopt
    from model import GPT

    if s.init_from:
        model, added = adopt(s.init_from, s.model, data, here.say)
        if s.lora_rank:
            lora.add(model, s.lora_rank, s.lora_alpha, s.lora_on, added, s.seed)
        return model
    shape = replace(s.model, vocab_size=data.tokenizer.vocab_size)
    if s.shard:
        from engine import sharding

        return sharding.new_model(shape, s.seed, here)  # the same, of which each keeps its part
    model = GPT(shape)
    model.init_weights(s.seed)
    return model


def windows_in_a_pass(share: int, s: Settings) -> int:
    """The most windows that device_batch allows and that divide the share of a process evenly, so
    that all passes have one shape, for which kernels may be compiled."""
    most = share if s.device_batch in (0, "auto") else min(s.device_batch, share)
    return next(n for n in range(most, 0, -1) if share % n == 0)


# --- the command


def main(argv: list[str]) -> int:
    s = preflight.read(Settings, argv)
    preflight.check(s)
    stop = Stop()  # before torch is imported, which takes a second or more
    preflight.prepare_missing(s.data)
    if s.show_batch:
        return outcome.show_batch(s)
    if s.eval_only:
        from evaluate import evaluate_run

        s.device_batch = 0 if s.device_batch == "auto" else s.device_batch
        return evaluate_run(s)
    return train(s, stop)


if __name__ == "__main__":
    settings.run(main)
