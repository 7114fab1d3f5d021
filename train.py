"""Training: python train.py config/small.py --steps=500

A model learns from text by predicting each next token, and being corrected. At its plainest:

    for step in range(steps):
        start = random.randrange(len(tokens) - T)     # tokens: the whole text as numbers, (N)
        x = tokens[None, start : start + T]           # (1, T)
        y = tokens[None, start + 1 : start + T + 1]   # (1, T): after each, the one that comes next
        loss = model(x, y)                            # how surprised the model is
        loss.backward()                               # how it would change with each p: p.grad
        with torch.no_grad():
            for p in model.parameters():
                p -= rate * p.grad                    # a small step downhill
                p.grad = None

`update` is the inside of that loop, also for batches too large for memory, for several processes
and for 16-bit numbers; `train` is the loop, with all windows in random order, a rate that holds and
then falls (and rises first, if asked), and a log. Both speak of

    s           the settings below, as the command line has them
    here        where it is computed: device, type of numbers, other processes   engine/machine.py
    data        a folder of tokens; split.batch(n, ...) is batch number n        dataset.py
    objective   what is learned: a batch becomes inputs, these become a loss     objectives/
    learner     the model, and what the objective adds to it                     engine/learner.py
    run         the folder of the run: its log, checkpoints, evaluations         engine/run.py

It runs as one process, or as several under torchrun, here on the eight GPUs of one machine:

    torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py

Interrupted, it continues where its newest checkpoint stands, when the same command is given again:
so after a change give --fresh, or another --out, or the old run goes on. To train on a text of your
own, prepare it first (prepare.py). To change something: the network is model.py, the loss
objectives/next_token.py, the optimizer `make_optimizers` and the rate `learning_rate` in optim.py;
README.md has the table, and which test shows that the change works.
"""

import math
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import objectives
from engine import outcome, preflight, settings
from engine.settings import BelowOne, Bound, Count, CountOrAuto, Fraction, NotNegative, Positive
from engine.stop import Stop
from evaluate import evaluate, evaluate_run
from shape import GPTConfig

if TYPE_CHECKING:  # torch takes a second to load: mistakes in settings are told before that
    from torch.optim import Optimizer

    from engine.learner import Learner
    from engine.machine import Machine
    from optim import LossScale

START = time.monotonic()  # of the command: s.minutes counts from here


# --- one step, and the loop


def update(
    learner: "Learner",
    optimizers: "list[Optimizer]",
    scale: "LossScale",
    inputs: tuple,
    counts: list,
    step: int,
    s: "Settings",
    here: "Machine",
) -> tuple[float, float]:
    """One step of learning: returns the batch's mean loss in nats, as it was before the step, and
    the norm of its gradient, which is not finite where float16 overflowed and no step was made.

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

    and the rest is for several passes, several processes, and 16 bits.

    `inputs` and `counts` are what the objective has made of this process's share of the batch:
    arrays such as the two above, and how many targets they hold, for each term of the loss.
    `scale.value` is 1 but for float16, see optim.py.
    Raises FloatingPointError, with no weight changed, if loss or gradient are not finite and a
    smaller scale is no remedy.
    """
    import torch

    from engine import machine

    # how many targets the batch has, in all processes. The loss is their mean: each pass below
    # gives a sum, divided by this number. (Passes may hold different numbers of targets, since in
    # rows only answers count: a mean of their means would give those of small passes more weight)
    in_all = here.sum(counts)
    mean_loss = torch.zeros((), device=here.device)
    share = len(inputs[0])
    per_pass = s.windows_in_a_pass(share)
    # 1. forward, and backward: by the chain rule, from the loss back to the first layer, how much
    # the loss would change with each weight: p.grad. A batch too large for memory is taken in
    # passes of some windows: backward() adds to the p.grad that is there (gradient accumulation)
    for i in range(0, share, per_pass):
        machine.seed(s.seed, step, here.rank, i)  # of dropout: resumed alike, a run drops the same
        # processes hold equal weights and learn from different windows. With the last pass
        # their gradients are added up, not averaged, since each loss is divided by the targets of
        # all already: then all make the same update. They travel while that pass goes on, unless
        # the model is compiled
        here.gradients.active = i + per_pass == share
        windows = [None if z is None else here.put(z[i : i + per_pass]) for z in inputs]
        # autocast: matrix products, forward and backward, are in 16 bits where the hardware is
        # faster so; weights, p.grad and the optimizer's sums stay in 32, where a small update to a
        # large number is not rounded away (arXiv:1710.03740)
        with here.autocast():
            # sums over all targets of this pass, one for each term of the objective: next_token
            # has [model(tokens, targets, "sum")]
            sums = learner(*windows)
        loss = learner.objective.total(sums, in_all)  # next_token: sums[0] / in_all[0]
        (loss * scale.value).backward()  # float16 would round small gradients to zero
        mean_loss += loss.detach()
    here.gradients.wait()
    scale.unscale(learner.parameters())  # before clipping, which must see the true gradient
    # 2. clipping: a gradient longer than grad_clip is shortened, its direction kept, so that one
    # odd batch does not outweigh all others in the optimizers' running means (arXiv:1211.5063)
    norm = torch.nn.utils.clip_grad_norm_(learner.parameters(), s.grad_clip or math.inf).item()
    # 3. the step itself. A gradient beyond the largest number of float16 is left out, and the scale
    # lowered for the next; any other that is not finite ends the run
    (mean,) = here.sum([mean_loss.item()])  # of all processes
    finite = math.isfinite(mean) and math.isfinite(norm)
    smaller_scale_helps = math.isfinite(mean) and scale.value > 1
    if not finite and not smaller_scale_helps:
        raise FloatingPointError(f"its loss is {mean} and its gradient norm {norm}")
    if finite:
        for optimizer in optimizers:
            optimizer.step()
    scale.update(finite)
    learner.zero_grad(set_to_none=True)
    return mean, norm


def train(s: "Settings", stop: Stop) -> int:
    """Trains a model, from the beginning or from where its run stands; returns the exit status.

    Steps are counted from 1, so that a step's number is that of updates done, and batches from 0,
    as are arrays. Batch 999 is a function of the number and the seed, and needs no memory of those
    before: so a run that is resumed takes the same batches. A loss that is not finite ends the run
    with a message.
    """
    from engine.learner import Learner
    from optim import LossScale, learning_rate, make_optimizers, set_rates

    # device and processes; the tokens; what is learned of them; the run's folder, where it stands
    here, data, objective, run = preflight.set_up(s, stop, START)
    split, held_out, T = data.split("train"), data.split("val"), s.model.block_size
    B = s.batch_tokens // T  # windows in a batch, of which each process has its share
    # all that learns, with random weights or those of the run's newest checkpoint
    model = run.load_model() if run.step else preflight.new_model(s, data, here)
    learner = Learner(model, objective)
    preflight.make_ready(learner, split, s, here, run)  # to the device, with faster parts
    optimizers = make_optimizers(learner, s, here.dtype)
    scale = LossScale(here.dtype, run.state["loss_scale"])
    validate = partial(evaluate, learner, held_out, here, stop, s.device_batch, s.eval_tokens)
    run.begin(data, learner, optimizers, scale, validate)  # moments of the checkpoint; the log
    if run.finished():
        return 0
    preflight.compile_kernels(learner, split, s, here)  # if asked, and by itself on a GPU
    with run:  # a request to stop waits for the end of a step; a loss that is not finite is told
        for step in run.steps():
            factor = learning_rate(step - 1, s.steps, s.warmup, s.decay, s.final_lr, s.schedule)
            set_rates(optimizers, factor)
            batch = split.batch(step - 1, B, T, s.seed, here.rank, here.world)
            for inputs, counts in objective.exercises(batch, learner):  # one, as a rule
                loss, norm = update(learner, optimizers, scale, inputs, counts, step, s, here)
            run.count(step)  # the time it took, by which s.minutes may set s.steps; signals
            if run.due(step, s.log_every) or step == 1:  # due every so many steps, and at the end
                run.log(step, loss=loss, lr=s.lr * factor, grad_norm=norm)  # into metrics.jsonl
            if run.due(step, s.save_every) or run.urgent(step):
                run.save(step)  # weights and moments; all that is random follows from (seed, step)
            if run.due(step, s.eval_every) and not run.stopping:
                run.evaluate(step)  # saves, and says the loss of held-out text: validate()
    if run.completed and here.rank == 0:
        outcome.show(learner.gpt, data, s, run)
    return run.status


# --- the settings: every --name=value. A config file overrides what stands here, config/small.py
# the sizes, steps and rates, and the command line overrides both

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
    minutes: NotNegative = 0.0  # as many steps as fit into that time, 60 at least; 0: all of them
    batch_tokens: Positive = 8192  # tokens in one update, over all processes
    device_batch: CountOrAuto = 0  # most windows in a pass; auto: as many as memory allows; 0: all
    optimizer: Literal["muon", "adamw", "nadamw"] = "muon"  # muon has AdamW for embeddings and head
    lr: Rate = 0.02  # of the matrices; with adamw of everything, and about 0.001 is right
    embed_lr: Rate = 0.3  # of the embeddings, with muon, relative to the size they begin with
    head_lr: Rate = 0.004  # of the head, biases and norm weights, with muon
    warmup: NotNegative = 0.0  # steps in which the rate rises; below 1: this fraction of all steps
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

    def windows_in_a_pass(self, share: int) -> int:
        """The most windows that device_batch allows and that divide the share of a process evenly,
        so that all passes have one shape, for which kernels may be compiled."""
        most = share if self.device_batch in (0, "auto") else min(self.device_batch, share)
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
        s.device_batch = 0 if s.device_batch == "auto" else s.device_batch
        return evaluate_run(s)
    return train(s, stop)


if __name__ == "__main__":
    settings.run(main)
