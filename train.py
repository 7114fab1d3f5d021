"""Token shards to checkpoints: python train.py config/small.py --steps=500

Runs as one process, or as several under torchrun, on one machine or many:

    torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py

Interrupted, it continues where its newest checkpoint stands, when the same command is given again.
"""

import json
import math
import os
import signal
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import config

START = time.monotonic()


@dataclass
class Settings:
    config: str = "config/small.py"  # file of settings; those on the command line go before it

    # what goes in and out
    data: str = "data/python"  # folder that prepare.py has written; data/python is made if missing
    tokenizer: str = ""  # vocabulary of a folder of public shards, which has no meta.json
    out: str = ""  # folder of the run; by default out/<name of the config file>
    init_from: str = ""  # begin with the weights of this run or checkpoint
    seed: int = 1  # of weights, order of the data, dropout

    # the model (see model.py)
    block_size: int = 256  # context in tokens
    n_layer: int = 4  # blocks
    n_head: int = 4  # attention heads
    n_kv_head: int = 0  # heads of keys and values; 0 means n_head
    n_embd: int = 128  # width
    head_dim: int = 0  # width of a head; 0 means n_embd / n_head
    mlp_dim: int = 0  # width inside the MLP; 0 means 4 * n_embd
    position: str = "rotary"  # or learned
    rope_base: float = 10000.0  # of the rotary positions: larger turns slower
    norm: str = "rms"  # or layer
    norm_weight: bool = False  # a learned scale in every norm
    norm_eps: float = 1e-6  # keeps norms from dividing by zero
    embed_norm: bool = True  # a norm after the embedding
    qk_norm: bool = True  # a norm of queries and keys
    mlp: str = "relu2"  # or gelu, swiglu
    bias: bool = False  # biases in linear layers and LayerNorm
    tied: bool = False  # the head is the embedding
    logit_cap: float = 15.0  # soft bound of the logits; 0 is none
    dropout: float = 0.0  # fraction of activations set to zero in training
    zero_init: bool = True  # residual projections and head begin at zero

    # the optimization
    steps: int = 1000  # updates
    batch_tokens: int = 8192  # tokens in one update, over all processes
    device_batch: int = 0  # most rows in one forward pass, which bounds memory; 0 is no bound
    optimizer: str = "muon"  # muon (AdamW for embeddings and head), adamw or nadamw
    lr: float = 0.02  # of the matrices
    embed_lr: float = 0.3  # of the embeddings, with muon
    head_lr: float = 0.004  # of head and vectors, with muon
    warmup: float = 0.0  # steps of linear rise; below 1: a fraction of steps
    decay: float = 0.6  # last fraction of the steps, in which the rate falls
    schedule: str = "linear"  # or cosine: the shape of the fall
    final_lr: float = 0.0  # where it ends, as a fraction of lr
    momentum: float = 0.95  # of muon
    beta1: float = 0.8  # of AdamW: decay of the mean gradient
    beta2: float = 0.95  # of AdamW: decay of the mean squared gradient
    weight_decay: float = 0.0  # of matrices; not of embeddings and head with muon
    grad_clip: float = 1.0  # largest norm of the gradient; 0 is no bound

    # what is kept and shown; the last step is always saved and evaluated
    log_every: int = 10  # steps between rows of metrics.jsonl
    eval_every: int = 500  # steps between evaluations on the whole validation split
    save_every: int = 500  # steps between checkpoints
    sample_tokens: int = 200  # length of the sample at the end
    sample_prompt: str = ""  # its beginning
    tensorboard: bool = False  # also log to TensorBoard, in the folder of the run
    wandb: str = ""  # also log to this project of Weights & Biases

    # the machine
    device: str = "auto"  # cuda, mps or cpu
    dtype: str = "auto"  # of matrix products: bfloat16, float16, float32
    compile: str = "auto"  # true or false
    deterministic: bool = False  # equal bits in every run on a GPU too, more slowly

    # instead of training
    eval_only: bool = False  # evaluate the best checkpoint of the run and change nothing
    split: str = "val"  # which split eval_only takes: train, val or test


# What may differ when a run is resumed; everything else would make it another run.
FREE = {"config", "data", "out", "init_from", "steps", "log_every", "eval_every", "save_every"}
FREE |= {"sample_tokens", "sample_prompt", "tensorboard", "wandb", "device", "eval_only", "split"}


def main(argv: list[str]) -> int:
    s = config.load(Settings, argv, "Train a GPT.", "config")
    s.out = s.out or f"out/{Path(s.config).stem}"
    check(s)
    stop = Stop()  # before torch is imported, which takes a second or more
    missing = Path(s.data).name == "python" and not Path(s.data).exists()
    if missing and int(os.environ.get("LOCAL_RANK", 0)) == 0:  # other ranks wait when all meet
        from prepare import Settings as Preparation
        from prepare import prepare

        prepare(Preparation(source=("python",), out=s.data))
    if s.eval_only:
        from evaluate import evaluate_run

        return evaluate_run(s)
    return train(s, stop)


def check(s: Settings) -> None:
    """Raises ValueError for the first setting that cannot work, before anything is loaded."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    rows = s.block_size * world
    processes = f" and {world} processes" if world > 1 else ""
    positive = "block_size n_layer n_head n_embd steps batch_tokens log_every eval_every save_every"
    choices = dict(optimizer="muon adamw nadamw", schedule="linear cosine", split="train val test")
    choices |= dict(position="rotary learned", norm="rms layer", mlp="relu2 gelu swiglu")
    not_negative = "n_kv_head head_dim mlp_dim norm_eps logit_cap device_batch lr embed_lr head_lr"
    not_negative += " warmup weight_decay grad_clip sample_tokens seed"
    fractions = "decay final_lr"
    below_one = "dropout momentum beta1 beta2"
    config.check(
        s,
        *((name, "at least 1", getattr(s, name) >= 1) for name in positive.split()),
        *((name, "at least 0", getattr(s, name) >= 0) for name in not_negative.split()),
        *((name, "from 0 to 1", 0 <= getattr(s, name) <= 1) for name in fractions.split()),
        *((name, "at least 0, below 1", 0 <= getattr(s, name) < 1) for name in below_one.split()),
        *(
            (name, f"one of {', '.join(options.split())}", getattr(s, name) in options.split())
            for name, options in choices.items()
        ),
        ("rope_base", "above 0", s.rope_base > 0),
        (
            "n_embd",
            f"a multiple of n_head={s.n_head}, unless head_dim is set",
            s.head_dim or s.n_embd % s.n_head == 0,
        ),
        ("n_head", f"a multiple of n_kv_head={s.n_kv_head}", s.n_head % (s.n_kv_head or 1) == 0),
        (
            "head_dim" if s.head_dim else "n_embd",
            "such that a head has an even width, for rotary positions turn pairs",
            s.position != "rotary" or (s.head_dim or s.n_embd // s.n_head) % 2 == 0,
        ),
        (
            "batch_tokens",
            f"a multiple of block_size={s.block_size}{processes}, such as "
            f"{max(rows, s.batch_tokens // rows * rows)}",
            s.batch_tokens % rows == 0,
        ),
        ("warmup", f"at most steps={s.steps}", s.warmup <= s.steps),
    )


class Stop:
    """A request to stop, by signal: noted here and honoured between two steps.

    While `at_once` is true, nothing would be lost and waiting may take long (imports, compilation,
    evaluation), so the process ends right there. So it does at a second signal.
    """

    def __init__(self):
        self.signal, self.at_once = 0, True
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self.note)

    def note(self, number: int, frame) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        if self.at_once:
            print(f"\nstopped by {self.name()}; the same command continues", flush=True)
            os._exit(0)

    def name(self) -> str:
        return signal.Signals(self.signal).name


def train(s: Settings, stop: Stop) -> int:
    import torch

    import checkpoint
    import machine
    import sample
    from dataset import Dataset
    from evaluate import compressors, evaluate
    from metrics import MetricsLog, best_row, start_trackers
    from model import IGNORE
    from optim import LossScale, learning_rate, make_optimizers

    # 1. the machine, the processes on it, and the folder of the run
    here = machine.pick(s.device, s.dtype, s.compile, s.n_embd)
    machine.start(here, s.deterministic)
    first, run = here.rank == 0, Path(s.out)  # the first process speaks and writes for all
    say = print if first else lambda *_: None
    say(f"machine: {here.why}")
    _lock = checkpoint.lock(run) if first else None  # held until the process ends

    # 2. the data
    data = Dataset(s.data, s.tokenizer)
    digest = data.verify() if first else ""
    train_split, val_split = data.split("train"), data.split("val")
    if train_split.tokens <= s.block_size:
        raise ValueError(
            f"the training split of {s.data} has {train_split.tokens} tokens, but a window takes"
            f" block_size + 1 = {s.block_size + 1}: use more text or a smaller block_size"
        )
    sizes = f"{train_split.tokens:,} tokens to train on, {val_split.tokens:,} to validate"
    say(f"data: {s.data}, {sizes}, vocabulary {data.tokenizer.vocab_size:,}")

    # 3. the model: new, or as the newest checkpoint of this run has it
    newest = checkpoint.newest(run) if first else None
    done = int(here.sum([newest or 0])[0])  # updates so far; the first process tells the others
    state = dict(metrics=None, seconds=0.0, loss_scale=None)
    if done:
        path = run / checkpoint.name(done)
        model, _, state = checkpoint.load_weights(path)
        check_resumed(s, state, digest if first else state["data_digest"], path)
    else:
        model = new_model(s, data.tokenizer)
    model.to(here.device)
    optimizers = make_optimizers(model, s, here.dtype)
    if done:
        checkpoint.load_optimizers(path, model, optimizers)
        say(f"resumed from step {done} of {run} (data digest {digest[:8]})")
    log = MetricsLog(run, done, state["metrics"]) if first else None
    seconds_before = state["seconds"]
    scale = LossScale(here.dtype, state["loss_scale"])
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    say(f"model: {count:,} parameters, {s.batch_tokens:,} tokens a step")

    # 4. what happens beside the updates
    def due(step: int, every: int) -> bool:
        return step % every == 0 or step == s.steps

    def record(**row) -> None:
        row["seconds"] = round(seconds_before + time.monotonic() - START, 3)
        if first:
            log.write(row)
            for track in trackers:
                track(row)

    def save(step: int) -> None:
        if first:
            state = dict(step=step, settings=asdict(s), model=asdict(model.config))
            state |= dict(data_digest=digest, metrics=log.mark(), loss_scale=scale.state())
            state |= dict(seconds=seconds_before + time.monotonic() - START, machine=here.why)
            tensors = checkpoint.optimizer_tensors(model, optimizers)
            checkpoint.save(run, step, model.state_dict(), tensors, state, data.tokenizer)

    def validate(step: int) -> None:
        stop.at_once = here.world == 1  # nothing would be lost: this step is saved
        loss, bpb = evaluate(model, val_split, here)
        stop.at_once = False
        record(step=step, val_loss=loss, val_bpb=bpb, tokens=step * s.batch_tokens)
        say(
            f"step {step}: validation loss {loss:.4f}"
            + (f", {bpb:.4f} bits per byte" if bpb else "")
        )
        if first:
            checkpoint.prune(run)

    trackers = start_trackers(s, run) if first else []
    if here.sum([bool(first and done and due(done, s.eval_every) and not log.evaluated)])[0]:
        validate(done)  # the run was stopped between saving and evaluating
    if done >= s.steps:
        say(f"nothing to do: {run} has reached step {done} of {s.steps}")
        return 0
    if first:
        text = json.dumps(asdict(s), indent=2) + "\n"
        checkpoint.write_durably(run / "config.json", text.encode())

    # 5. the updates
    forward = torch.compile(model) if here.compile else model
    gradients = machine.GradientSum(parameters) if here.world > 1 else None
    rows = s.batch_tokens // s.block_size  # of a batch, over all processes
    share = rows // here.world  # of this process; below, the rows of one forward pass
    micro = next(n for n in range(min(s.device_batch or share, share), 0, -1) if share % n == 0)
    busy, last_shown = 0.0, done
    for step in range(done, s.steps):  # `step` updates are done
        began = time.monotonic()
        factor = learning_rate(step, s.steps, s.warmup, s.decay, s.final_lr, s.schedule)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["base_lr"] * factor
        x, y = train_split.batch(step, rows, s.block_size, s.seed, here.rank, here.world)
        (counted,) = here.sum([int((y != IGNORE).sum())])
        loss = torch.zeros((), device=here.device)
        for i in range(0, share, micro):
            if s.dropout:
                machine.seed(s.seed, step, here.rank, i)
            if gradients:
                gradients.active = i + micro == share  # once, while the last backward pass runs
            inputs, targets = here.put(x[i : i + micro]), here.put(y[i : i + micro])
            with here.autocast():
                part = forward(inputs, targets, reduction="sum") / counted
            (part * scale.value).backward()
            loss += part.detach()
        if gradients:
            gradients.wait()
        scale.unscale(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, s.grad_clip or math.inf).item()
        loss, stopping = here.sum([loss.item(), bool(stop.signal)])
        finite = math.isfinite(loss) and math.isfinite(norm)
        if not finite and not (scale.value > 1 and math.isfinite(loss)):
            say(
                f"stopped after step {step}: in the next one the loss is {loss} and the gradient"
                f" norm {norm}, so no update was made; its batch is windows {step * rows} to"
                f" {(step + 1) * rows - 1} of the endless order. The last checkpoint is that of"
                f" step {newest or 0}; a lower lr may help."
            )
            return 3
        stop.at_once = False
        if finite:  # float16 may overflow now and then: that update is left out
            for optimizer in optimizers:
                optimizer.step()
        scale.update(finite)
        model.zero_grad(set_to_none=True)
        busy += time.monotonic() - began

        step += 1
        if due(step, s.log_every):
            speed, tokens = (step - last_shown) * s.batch_tokens / busy, step * s.batch_tokens
            left = (s.steps - step) * s.batch_tokens / speed
            rate, norm = s.lr * factor, norm if finite else None
            record(
                step=step,
                loss=loss,
                lr=rate,
                grad_norm=norm,
                tokens=tokens,
                tokens_per_second=round(speed, 1),
            )
            say(
                f"step {step} of {s.steps}  loss {loss:.4f}  lr {rate:.2e}"
                f"  gradient {norm or math.inf:.3f}  {speed:,.0f} tokens/s"
                f"  {int(left) // 60}:{int(left) % 60:02d} left"
            )
            busy, last_shown = 0.0, step
        evaluating = due(step, s.eval_every)
        if saving := evaluating or due(step, s.save_every) or bool(stopping):
            save(step)
            newest = step
        if evaluating and not stopping:
            validate(step)
        elif saving and first:
            checkpoint.prune(run)
        if stopping:
            say(f"stopped by a signal; saved step {step} of {run}: the same command continues")
            return 0

    # 6. the result
    if not first:
        return 0
    for track in trackers:
        track(None)
    best = best_row(run)
    say(f"\nbest validation loss: {best['val_loss']:.4f} nats a token, at step {best['step']}")
    if best["val_bpb"]:
        others = compressors(val_split, data.tokenizer)
        say(
            f"bits per byte of that text: {best['val_bpb']:.3f}"
            + (f" ({others})" if others else "")
        )
    if s.sample_tokens:
        say("\na sample:\n")
        picked = sample.Settings(max_tokens=s.sample_tokens, seed=s.seed)
        sample.write_samples(model.eval(), data.tokenizer, s.sample_prompt, picked)
    say(f"\nnext: python sample.py {run} --prompt={json.dumps(s.sample_prompt)}")
    return 0


def new_model(s: Settings, tokenizer):
    """A model with random weights, or with those of the checkpoint `init_from`."""
    from checkpoint import find, load_weights
    from model import GPT, GPTConfig

    if s.init_from:
        model, theirs, _ = load_weights(find(s.init_from))
        if theirs.digest() != tokenizer.digest():
            raise ValueError(
                f"init_from={s.init_from!r} reads {theirs.name} ({theirs.vocab_size} tokens), and"
                f" {s.data} is written in {tokenizer.name} ({tokenizer.vocab_size} tokens): prepare"
                " the data with the tokenizer of the model"
            )
        model.set_context(s.block_size, s.dropout)
        return model
    shape = {f.name: getattr(s, f.name) for f in fields(GPTConfig) if f.name != "vocab_size"}
    model = GPT(GPTConfig(tokenizer.vocab_size, **shape))
    model.init_weights(s.seed, s.zero_init)
    return model


def check_resumed(s: Settings, state: dict, digest: str, path: Path) -> None:
    """Raises ValueError if going on from `state` with settings `s` would make it another run."""
    before, now = state["settings"], asdict(s)
    differ = [k for k in now if k not in FREE and before.get(k) != now[k]]
    if differ:
        changes = ", ".join(f"{k} was {before.get(k)!r} and is {now[k]!r}" for k in differ)
        raise ValueError(f"{path} belongs to another run ({changes}): choose another --out")
    if state["data_digest"] != digest:
        raise ValueError(
            f"the data in {s.data} (digest {digest[:8]}) is not what {path} was trained on"
            f" ({state['data_digest'][:8]}): bring it back, or choose another --out"
        )
    if before["steps"] != s.steps:
        print(f"steps: was {before['steps']}, is {s.steps}; the learning rate follows")


if __name__ == "__main__":
    config.run(main)
