"""How a run goes on: whose its folder is, and what must not have changed since it stopped."""

import json
import os
import shutil
from itertools import count
from pathlib import Path

from engine import checkpoint, settings
from engine.files import WINDOWS, lock_file, require_space, write_durably
from engine.metrics import MetricsLog

# What may differ when a run is resumed; anything else would make it another run. First where things
# are and what is shown, then where and how it is computed: the data and the mathematics stay.
FREE = {"config", "data", "tokenizer", "out", "init_from", "fresh", "steps", "minutes", "patience"}
FREE |= {"eval_tokens", "log_every", "eval_every", "save_every"}
FREE |= {"sample_tokens", "sample_prompt"}
FREE |= {"tensorboard", "wandb", "eval_only", "split", "show_batch"}
FREE |= {"device", "dtype", "compile", "threads", "fast", "deterministic", "device_batch"}
FREE |= {"shard", "checkpoint_activations"}
ALOUD = {"steps": "the learning rate follows", "eval_tokens": "losses compare less exactly"}


def open_folder(run) -> int:
    """Locks the folder and clears what was interrupted there; returns the newest step."""
    if not run.folder.exists():
        return 0  # made by `take_up`, when no mistake has been found
    run.lock = lock(run.folder)
    if run.fresh:
        return 0  # moved aside by `take_up`, likewise
    for pattern in ("step-*.partial", "step-*.old"):  # an interrupted save or deletion
        for leftover in run.folder.glob(pattern):
            shutil.rmtree(leftover)
    for leftover in run.folder.glob("*.partial"):
        leftover.unlink()
    step, run.files = checkpoint.newest(run.folder)
    return step


def take_up(run) -> None:
    """Opens the log of a run that may begin or go on. Raises ValueError, with nothing changed."""
    state, now = run.state, settings.flat(run.s)
    if run.step:
        check(run, settings.known(type(run.s), state["settings"]), now)
    need = sum(p.nbytes * (3 if p.requires_grad else 1) for p in run.learner.parameters())
    free = require_space(run.folder, need)
    if run.fresh and run.lock:
        if WINDOWS:  # where nothing in a folder may be open when it is renamed
            run.lock.close()
        move_aside(run.folder)
        run.lock = None
    run.lock = run.lock or lock(run.folder)
    run.log_file = MetricsLog(run.s, run.step, state["metrics"])
    path = run.folder / "config.json"
    sound = (as_file(state["settings"]), as_file(now)) if run.step else ()
    if run.step and (not path.exists() or path.read_bytes() not in sound):
        print(f"{path} is not that of the checkpoint: written anew")
    write_durably(path, as_file(now))
    print(f"a checkpoint takes up to {need / 1e6:,.1f} MB; {free / 1e6:,.0f} MB are free")


def require_same(path: Path, before: dict, now: dict) -> None:
    """Raises ValueError if settings were others that make another run."""
    differ = [k for k in now if k not in FREE and before[k] != now[k]]
    if differ:
        changes = ", ".join(f"{k} was {before[k]!r}, is {now[k]!r}" for k in differ)
        raise ValueError(
            f"{path} belongs to a run with other settings ({changes}): choose another --out, or"
            " begin anew with --fresh"
        )


def require_facts(path: Path, state: dict, facts: dict, remedy: str = "") -> None:
    """Raises ValueError if what an objective depends on is another than in a checkpoint's state."""
    for key, was in (state.get("objective") or {}).items():
        if key != "name" and facts.get(key) != was:
            raise ValueError(
                f"{path} was trained with {key} {str(was)[:60]!r}, and it is now"
                f" {str(facts.get(key))[:60]!r}: bring it back{remedy}"
            )


def check(run, before: dict, now: dict) -> None:
    """Says where `run` goes on, given its settings before and now.

    Raises ValueError if that would make it another run.
    """
    require_same(run.path, before, now)
    facts = run.learner.objective.facts()
    require_facts(run.path, run.state, facts, ", or begin anew with --fresh")
    digest = run.state["data_digest"]
    if digest != run.digest:
        raise ValueError(
            f"the data in {run.s.data} (digest {run.digest[:8]}) is not what {run.path} was"
            f" trained on ({digest[:8]}): bring it back, or begin anew with --fresh"
        )
    verified = f"{run.files} files verified, data digest {digest[:8]}"
    print(f"resumed from step {run.step} of {run.folder} ({verified})")
    if run.s.init_from:
        print(f"init_from={run.s.init_from!r} is not read again: the run has its own weights")
    for name, meaning in ALOUD.items():
        if before[name] != now[name]:
            print(f"{name} was {before[name]}, is {now[name]}: {meaning}")
    for name, value in run.circumstances.items():
        was = run.state["machine"].get(name, value)
        if was != value:
            print(f"{name} was {was}, is {value}: the same data, but not the same bits")


def same_data(data, here) -> str | None:
    """The digest of the data, in the first process. Several machines may each have a copy: then the
    first process of each verifies it. Raises ValueError where it is another."""
    digest = here.first_does(data.verify)
    if here.world == int(os.environ.get("LOCAL_WORLD_SIZE", here.world)):
        return digest
    mine, problem = digest, None
    if here.rank and os.environ["LOCAL_RANK"] == "0":
        try:
            mine = data.verify()
        except (ValueError, OSError) as e:
            problem = e
    if here.any(problem is not None):
        raise problem or SystemExit(2)
    start = 12  # hexadecimal digits, which a float64 holds exactly
    of_first = int(here.from_first(int((digest or "0")[:start], 16)))
    differs = mine is not None and int(mine[:start], 16) != of_first
    if here.any(differs):
        if not differs:
            raise SystemExit(2)
        raise ValueError(
            f"the data in {data.folder} on this machine (digest {mine[:8]}) is not what the first"
            f" machine has ({of_first:012x}): copy it from there"
        )
    return digest


def as_file(values: dict) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def lock(folder: Path):
    """Makes `folder` this process's own until the returned handle is closed. Raises ValueError."""
    parts = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if parts and "lock" not in parts:
        raise ValueError(f"{folder} holds something else than a run: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return lock_file(folder / "lock", wait=False)
    except BlockingIOError as e:
        raise ValueError(f"another process works in {folder}: choose another --out") from e


def move_aside(folder: Path) -> None:
    """Renames the folder of a run that has something in it to the next free <name>.1, .2, ..."""
    if not any(path.name != "lock" for path in folder.iterdir()):
        return
    aside = next(p for n in count(1) if not (p := folder.with_name(f"{folder.name}.{n}")).exists())
    folder.rename(aside)
    print(f"the old run is now {aside}")
