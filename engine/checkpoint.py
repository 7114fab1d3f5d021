"""Atomic, verified, pickle-free checkpoints.

    out/<run>/  lock  config.json  metrics.jsonl  and for each kept step
        step-00000400/  model.safetensors  optimizer.safetensors  state.json
                        encoding.json  vocab.tiktoken  manifest.json

A checkpoint is written beside its final name, flushed to disk and then renamed, so its name never
stands on half of one. The manifest holds size and sha256 of every other file and is written last.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING

from engine import files
from engine.files import atomic_folder, require_space, write_manifest
from engine.metrics import best_row
from engine.settings import Setting, convert, settings_of
from shape import GPTConfig
from tokenizer import Tokenizer

if TYPE_CHECKING:  # torch is imported where it is used: finding and verifying needs none
    from torch import Tensor

    from dataset import Dataset
    from model import GPT

TO_SAMPLE = ("model.safetensors", "state.json", "encoding.json", "vocab.tiktoken")
FILES = (*TO_SAMPLE, "optimizer.safetensors")


def name(step: int) -> str:
    return f"step-{step:08d}"


# --- write


def save(
    run: Path,
    step: int,
    model: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: dict,
    tokenizer: Tokenizer,
) -> None:
    """Writes `run`/step-… whole or not at all. Raises OSError, say if the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    require_space(run, sum(t.nbytes for t in [*model.values(), *optimizer.values()]))
    final = run / name(step)
    try:
        with atomic_folder(final) as partial:
            save_file(model, partial / "model.safetensors")
            save_file(optimizer, partial / "optimizer.safetensors")
            text = json.dumps(state, indent=2) + "\n"
            (partial / "state.json").write_text(text, encoding="utf-8")
            tokenizer.save(partial)
            write_manifest(partial)
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or e
        raise OSError(
            f"{final} could not be saved ({reason}); earlier checkpoints are whole"
        ) from e


def prune(run: Path, keep: int = 2) -> None:
    """Deletes all checkpoints but the newest `keep` and the best."""
    best = best_row(run)
    for path in checkpoints(run)[keep:]:
        if not best or path.name != name(best["step"]):
            doomed = path.with_name(f"{path.name}.old")  # no checkpoint any more, whatever happens
            path.rename(doomed)
            shutil.rmtree(doomed)


# --- read


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first; whether they are sound is for `verify` to say."""
    found = [p for p in run.glob("step-*") if p.name[5:].isdigit() and p.is_dir()]
    return sorted(found, reverse=True)


def verify(path: Path, names: tuple[str, ...] = FILES) -> int:
    """Checks files of a checkpoint (default: all); returns how many. Raises ValueError."""
    files.verify(path, names)
    return len(names)


def newest(run: Path) -> tuple[int, int]:
    """Step of the newest sound checkpoint, and how many files were verified; zeros without one.

    Unsound ones are named and renamed, so that a later save can take their name. Raises ValueError
    if there are none but unsound ones.
    """
    for path in checkpoints(run):
        try:
            return int(path.name[5:]), verify(path)
        except ValueError as e:
            aside = path.with_name(f"{path.name}.corrupt")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            print(f"{e}; it is now {aside.name}, and the checkpoint before it counts")
    if any(run.glob("step-*.corrupt")):
        raise ValueError(f"{run} has no sound checkpoint left: begin anew with --fresh")
    return 0, 0


def find(path: str, checkpoint: str = "best") -> Path:
    """The checkpoint folder meant by `path`: itself, or in a run the best, latest or named one."""
    run = Path(path)
    if not run.is_dir():
        raise ValueError(
            f"no such folder: {path!r} (a run or a checkpoint that train.py has written)"
        )
    if (run / "manifest.json").exists():
        return run
    found = checkpoints(run)
    if not found:
        raise ValueError(f"{path} holds no checkpoint: train one with `python train.py`")
    if checkpoint in ("best", "latest"):
        best = best_row(run)
        wanted = run / name(best["step"]) if best and checkpoint == "best" else found[0]
        return wanted if wanted in found else found[0]
    wanted = run / (name(int(checkpoint)) if checkpoint.isdecimal() else checkpoint)
    if wanted not in found:
        names = ", ".join(p.name for p in reversed(found))
        raise ValueError(
            f"{path} has no checkpoint {checkpoint!r}: choose best, latest or one of {names}"
        )
    return wanted


# what state.json holds, and of which kinds
STATE = dict(step=int, settings=dict, model=dict, data_digest=(str, NoneType), seconds=(int, float))
STATE |= dict(metrics=(dict, NoneType), loss_scale=(list, NoneType), machine=(dict, NoneType))


@contextmanager
def named(path: Path):
    """Within, content that train.py would not have written is a ValueError that names `path`: a
    manifest says that nothing has changed since, and not who wrote it."""
    from safetensors import SafetensorError

    errors = (SafetensorError, ValueError, KeyError, TypeError, RuntimeError)
    try:
        yield
    except errors as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise ValueError(f"{path} is damaged, or of another shape: {reason:.200}") from e


def read_state(path: Path) -> tuple[dict, GPTConfig]:
    """state.json and the shape of its model; a setting that is newer than it has its default."""
    with named(path / "state.json"):
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        for key, kinds in STATE.items():
            if not isinstance(state[key], kinds):
                raise TypeError(f"{key}={state[key]!r}")
        known = settings_of(GPTConfig) | {"vocab_size": Setting(int)}
        shape = {key: convert(key, value, known[key]) for key, value in state["model"].items()}
        return state, GPTConfig(**shape)


def load_weights(path: Path) -> tuple[GPT, Tokenizer, dict]:
    """Model (on the CPU), tokenizer and state of a checkpoint folder, verified.

    Raises ValueError if it is damaged, or if model.py makes another model of its shape.
    """
    with ThreadPoolExecutor(1) as pool:
        verified = pool.submit(verify, path, TO_SAMPLE)  # while torch is loaded
        import torch
        from safetensors.torch import load_file

        from model import GPT
    verified.result()
    state, config = read_state(path)
    with named(path / "model.safetensors"):
        # the header is compared with the size of the file before anything is allocated, and the
        # model has shapes only, until it is given the weights of the file
        weights = load_file(path / "model.safetensors")
        with torch.device("meta"):
            model = GPT(config)
        model.load_state_dict(weights, assign=True)
    return model, Tokenizer.load(path), state


def load_model(path: str, checkpoint: str = "best", device: str = "cpu") -> tuple[GPT, Tokenizer]:
    """An eval-mode model and its tokenizer, from a run or a checkpoint folder.

    `checkpoint` is "best" (lowest validation loss), "latest", "step-00000400" or "400".
    Raises ValueError if there is none or if it is damaged.
    """
    model, tokenizer, _ = load_weights(find(path, checkpoint))
    return model.to(device).eval(), tokenizer


def adopt(path: str, shape: GPTConfig, data: Dataset, say) -> GPT:
    """The model of another run or checkpoint, with the context and dropout of `shape`.

    Raises ValueError unless it reads the tokens of `data`.
    """
    model, theirs, _ = load_weights(find(path))
    data.require_tokenizer(theirs, path)
    free = ("vocab_size", "block_size", "dropout", "zero_init")
    found = asdict(model.config)
    other = [f"{k}={v}" for k, v in found.items() if v != getattr(shape, k) and k not in free]
    if other:
        say(f"the shape is that of {path}, not of the settings: {', '.join(other)}")
    model.set_context(shape.block_size, shape.dropout)
    return model


# --- optimizers as named tensors


def optimizer_tensors(model: GPT, optimizers: list) -> dict[str, Tensor]:
    """The state of all optimizers: "<parameter>/<entry>" to tensor."""
    import torch

    tensors = {}
    for name, p in model.named_parameters():
        for optimizer in optimizers:
            for key, value in optimizer.state.get(p, {}).items():
                tensors[f"{name}/{key}"] = torch.as_tensor(value)
    return tensors


def load_optimizers(path: Path, model: GPT, optimizers: list) -> None:
    """Puts the optimizer state of a checkpoint folder back into the optimizers of `model`."""
    from safetensors.torch import load_file

    parameters = dict(model.named_parameters())
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    with named(path / "optimizer.safetensors"):
        for key, value in load_file(path / "optimizer.safetensors").items():
            parameter, entry = key.rsplit("/", 1)
            p = parameters[parameter]
            on_cpu = entry in ("step", "mu_product") and not owner[p].defaults.get("fused")
            owner[p].state[p][entry] = value if on_cpu else value.to(p.device)
