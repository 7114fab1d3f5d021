"""Atomic, verified, pickle-free checkpoints.

    out/<run>/  lock  config.json  metrics.jsonl  and for each kept step
        step-00000400/  model.safetensors  optimizer.safetensors  state.json
                        encoding.json  vocab.tiktoken  manifest.json
                        heads.safetensors, what an objective has beside the model

A checkpoint is written beside its final name, flushed to disk and then renamed, so its name never
stands on half of one. The manifest holds size and sha256 of every other file and is written last.
A run of lora.py has one base.safetensors, the frozen weights, and in each checkpoint instead of
all weights an adapter.safetensors, which is small; state.json knows the sha256 of the base.
Of files of tensors that are locked, as weights.py does it, there is <file>.age: engine/locked.py.
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING

from engine import files, locked
from engine.files import sha256_of, verify
from engine.metrics import best_row
from engine.settings import Setting, convert, settings_of
from shape import GPTConfig
from tokenizer import Tokenizer

if TYPE_CHECKING:  # torch is imported where it is used: finding and verifying needs none
    from torch import Tensor

    from engine.learner import Learner
    from model import GPT

BASE, KEPT = "base.safetensors", "objective.safetensors"
NEEDED = ("state.json", "encoding.json", "vocab.tiktoken")  # in every checkpoint, beside weights


def name(step: int) -> str:
    return f"step-{step:08d}"


# --- write


def save(
    run: Path, step: int, learner: Learner, optimizers: list, state: dict, tokenizer: Tokenizer
) -> None:
    """Writes `run`/step-… whole or not at all. Raises OSError, say if the disk is full."""
    import lora
    from engine.tensors import write_safetensors

    parts, final, adapted = parts_of(learner, optimizers), run / name(step), lora.facts(learner.gpt)
    shapes = {part: {n: [*t.shape] for n, t in held.items()} for part, held in parts.items()}
    pieces = {part: in_pieces(held) for part, held in parts.items()}
    try:
        files.require_space(run, sum(t.nbytes for held in parts.values() for t in held.values()))
        if adapted and "base" not in adapted:  # the first time
            with files.atomic_file(run / BASE) as beside:
                base = lora.frozen(learner.gpt)
                write_safetensors(beside, {n: [*t.shape] for n, t in base.items()}, base.values())
                adapted["base"] = sha256_of(beside)
        state |= {"lora": adapted} if adapted else {}
        with files.atomic_folder(final) as partial:
            for part in parts:
                write_safetensors(partial / f"{part}.safetensors", shapes[part], pieces[part])
            text = json.dumps(state, indent=2) + "\n"
            (partial / "state.json").write_text(text, encoding="utf-8")
            tokenizer.save(partial)
            files.write_manifest(partial)
    except OSError as e:
        raise OSError(
            f"{final} could not be saved ({e.strerror or e}); earlier checkpoints are whole"
        ) from e
    finally:
        for rest in pieces.values():  # whoever sends a piece waits until it has been taken
            deque(rest, maxlen=0)


def hand_over(learner: Learner, optimizers: list) -> None:
    """What the other processes do while the first one saves: they give it what they have."""
    for held in parts_of(learner, optimizers).values():
        deque(in_pieces(held), maxlen=0)


def parts_of(learner: Learner, optimizers: list) -> dict[str, dict[str, Tensor]]:
    """The files of tensors of a checkpoint, and what is in each, in order of name."""
    import lora

    model, heads = learner.gpt, learner.heads.state_dict()
    parts = {"adapter": lora.learned(model)} if lora.facts(model) else {"model": model.state_dict()}
    parts |= {"heads": heads} if heads else {}
    parts |= {"optimizer": optimizer_tensors(learner.by_name(), optimizers)}
    return {part: dict(sorted(held.items())) for part, held in parts.items()}


def in_pieces(held: dict[str, Tensor]) -> Iterator[Tensor]:
    """The tensors one after the other, sharded ones a part of their rows at a time."""
    for tensor in held.values():
        if hasattr(tensor, "to_local"):
            from engine.sharding import whole_in_pieces  # which takes a second to load

            yield from whole_in_pieces(tensor)
        else:
            yield tensor


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


def newest(run: Path) -> tuple[int, int]:
    """Step of the newest sound checkpoint, and how many files were verified; zeros without one.

    Unsound ones are named and renamed, so that a later save can take their name. Raises ValueError
    if there are none but unsound ones.
    """
    for path in checkpoints(run):
        locked.names(path)  # refused: they are whole
        try:
            return int(path.name[5:]), verify(path, NEEDED)
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
            f"no such folder: {path!r} (a run or a checkpoint, which train.py writes, or"
            " `huggingface.py import` of other weights)"
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


def saved_shape(model: dict) -> GPTConfig:
    """The shape that state.json has as `model`. A setting that is newer than it has its default;
    one that there is no more counts for nothing if it was off. Raises ValueError."""
    known = settings_of(GPTConfig) | {"vocab_size": Setting(int)}
    shape = {key: value for key, value in model.items() if value or key in known}
    if gone := shape.keys() - known:
        raise ValueError(f"{', '.join(gone)}: set, and in this version no setting of a shape")
    return GPTConfig(**{key: convert(key, value, known[key]) for key, value in shape.items()})


def read_state(path: Path) -> tuple[dict, GPTConfig]:
    """state.json and the shape of its model."""
    with named(path / "state.json"):
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        for key, kinds in STATE.items():
            if not isinstance(state[key], kinds):
                raise TypeError(f"{key}={state[key]!r}")
        return state, saved_shape(state["model"])


def load_weights(
    path: Path, merge: bool = True, sound: bool = False
) -> tuple[GPT, Tokenizer, dict]:
    """Model (on the CPU), tokenizer and state of a checkpoint folder, verified but if `sound`.

    Weights are mapped from the file: of what is not used, nothing is read. An adapter becomes part
    of the weights; without `merge` it stays apart, and learns on. Raises
    ValueError if anything is damaged, or if model.py makes another model of its shape.
    """
    skip = ["optimizer.safetensors", *locked.names(path)]
    with ThreadPoolExecutor(1) as pool:
        verified = pool.submit(verify, path, NEEDED, skip) if not sound else None
        import lora  # and torch, meanwhile
        from engine.machine import shapes_only
        from model import GPT
    if verified:
        verified.result()
    state, config = read_state(path)
    adapted = state.get("lora")
    file = path.parent / BASE if adapted else path / "model.safetensors"
    weights = load_tensors(file, adapted["base"] if adapted else "")
    with named(file):
        # the model has shapes only, until it is given the weights of the file
        with shapes_only():
            model = GPT(config)
        model.load_state_dict(weights, assign=True)
    if adapted:
        file = path / "adapter.safetensors"
        weights = load_tensors(file)
        with named(file):
            lora.restore(model, adapted, weights)
    if adapted and merge:
        lora.merge(model)
    return model, Tokenizer.load(path), state


def load_tensors(file: Path, sha256: str = "") -> dict[str, Tensor]:
    """Those of a file with this sha256; by default it is one of a checkpoint that is verified.

    A locked one is decrypted into memory alone, and verified now. Raises ValueError.
    """
    from safetensors.torch import load, load_file

    if locked.key_of(file.parent):
        manifest = file.parent / "manifest.json"
        with named(manifest):
            sha256 = sha256 or json.loads(manifest.read_bytes())[file.name]["sha256"]
        content = locked.read(file, sha256)
        with named(file):
            return load(content)
    if sha256 and not (file.exists() and sha256_of(file) == sha256):
        raise ValueError(f"{file} is missing, or not what belongs here (sha256): bring it back")
    with named(file):
        # the header is compared with the size of the file before anything is allocated
        return load_file(file)


def load_heads(path: Path, learner: Learner) -> None:
    """Gives a learner the heads of a checkpoint folder that is verified."""
    file = path / "heads.safetensors"
    heads = load_tensors(file) if file.exists() or locked.of(file).exists() else {}
    with named(file):
        learner.heads.load_state_dict(heads)


def save_kept(run: Path, tensors: dict[str, Tensor]) -> str | None:
    """Writes what an objective keeps for a whole run; returns its sha256, None if it is nothing."""
    from safetensors.torch import save_file

    if not tensors:
        return None
    with files.atomic_file(run / KEPT) as beside:
        save_file(tensors, beside)
        return sha256_of(beside)


def load_kept(path: Path, state: dict) -> dict[str, Tensor]:
    """What the objective of a checkpoint keeps for its run. Raises ValueError."""
    return load_tensors(path.parent / KEPT, state["kept"]) if state.get("kept") else {}


def load_model(
    path: str, checkpoint: str = "best", device: str = "cpu", passphrase_file: str = ""
) -> tuple[GPT, Tokenizer]:
    """An eval-mode model and its tokenizer, from a run or a checkpoint folder.

    `checkpoint` is "best" (lowest validation loss), "latest", "step-00000400" or "400".
    Raises ValueError if there is none or if it is damaged.
    """
    found = find(path, checkpoint)
    locked.use(passphrase_file, found)
    model, tokenizer, _ = load_weights(found)
    return model.to(device).eval(), tokenizer


# --- optimizers as named tensors


def optimizer_tensors(named: dict, optimizers: list) -> dict[str, Tensor]:
    """The state of all optimizers, of parameters by name: "<parameter>/<entry>" to tensor."""
    import torch

    tensors = {}
    for name, p in named.items():
        for optimizer in optimizers:
            for key, value in optimizer.state.get(p, {}).items():
                tensors[f"{name}/{key}"] = torch.as_tensor(value)
    return tensors


def load_optimizers(path: Path, parameters: dict, optimizers: list) -> None:
    """Puts the optimizer state of a checkpoint folder back into the optimizers of `parameters`."""
    from safetensors.torch import load_file

    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    with named(path / "optimizer.safetensors"):
        for key, value in load_file(path / "optimizer.safetensors").items():
            parameter, entry = key.rsplit("/", 1)
            p = parameters[parameter]
            on_cpu = entry in ("step", "mu_product") and not owner[p].defaults.get("fused")
            if hasattr(p, "to_local") and value.shape == p.shape:
                from engine.sharding import rows_of

                owner[p].state[p][entry] = rows_of(value, p)
            else:
                owner[p].state[p][entry] = value if on_cpu else value.to(p.device)
