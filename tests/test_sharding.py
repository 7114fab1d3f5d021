"""Sharding: several processes train as one, and none of them ever has the whole model.

Processes are forked from one that has loaded torch, with the environment that torchrun would give
them: starting them takes no time.
"""

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY
from forked import context, environments, server_begins
from safetensors.torch import load_file
from test_train import rows

from engine import checkpoint, memory
from engine.learner import Learner
from engine.machine import Machine

pytestmark = pytest.mark.cpu

# blocks: two of them at once are not yet the whole; canon layers have fewer rows than processes
FOUR = ["--n_layer=4", "--dropout=0.0", "--canon=4"]


@pytest.fixture(scope="module")
def processes(tmp_path_factory, data):
    """processes(world, name, *settings) trains, sharded, into a folder of that name; returns it,
    and what each process has reported. `dies` is the step in which the last process is killed,
    `full` the one whose checkpoint finds no room; `copies` are the data of one machine each."""
    folder = tmp_path_factory.mktemp("sharding")
    (folder / "empty.py").write_text("")

    def run(world: int, name: str, *settings: str, dies: int = 0, full: int = 0, copies=()):
        out = folder / name
        argv = [str(folder / "empty.py"), f"--data={data}", f"--out={out}", *TINY, *FOUR, *settings]
        reports, ranks = [folder / f"report{rank}" for rank in range(world)], []
        for rank, mine in enumerate(environments(world)):
            dying, own = dies if rank == world - 1 else 0, argv
            if copies:  # each process is a machine of its own
                mine |= dict(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
                own = [*argv, f"--data={copies[rank]}"]
            ranks.append(context.Process(target=work, args=(own, mine, reports[rank], dying, full)))
            server_begins()
            ranks[-1].start()
        for process in ranks:
            process.join(120)
        found = [json.loads(r.read_text()) for r in reports if r.exists()]
        for report in reports:
            report.unlink(missing_ok=True)
        if not dies:
            assert [p.exitcode for p in ranks] == [2 if copies or full else 0] * world, found
        return out, found

    run.folder = folder
    return run


def work(argv: list[str], env: dict, report: Path, dies: int, full: int) -> None:
    """One process: trains, and writes what it has seen."""
    os.environ.update(env)
    sys.path.insert(0, str(ROOT))
    sys.stdout = open(os.devnull, "w")
    import engine.sharding
    import engine.tensors
    import optim
    import train

    seen = dict(matrices=0, blocks=0, piece=0, kept=0)
    update, sharded = train.update, "--shard=true" in argv

    def spied(learner, optimizers, scale, inputs, counts, step, *others):
        if step == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        found = []  # gradients, which are gone behind the update
        hook = optimizers[0].register_step_pre_hook(
            lambda *_: found.extend(local(p.grad for p in learner.parameters()))
        )
        done = update(learner, optimizers, scale, inputs, counts, step, *others)
        hook.remove()
        state = [z for o in optimizers for s in o.state.values() for z in s.values()]
        seen["kept"] = sum(z.nbytes for z in [*local(learner.parameters()), *local(state), *found])
        seen["gradients"] = sum(z.nbytes for z in found)
        return done

    def local(some) -> list:
        return [getattr(z, "_local_tensor", z) for z in some]

    def whole_now(blocks) -> None:
        whole = sum(p.nbytes for b in blocks for p in b.parameters() if not hasattr(p, "to_local"))
        seen["blocks"] = max(seen["blocks"], whole)

    def watch(learner) -> None:
        for block in learner.gpt.blocks:

            def after(module, inputs, y, blocks=learner.gpt.blocks):
                whole_now(blocks)
                if y.requires_grad:  # and when the backward pass comes
                    y.register_hook(lambda _: whole_now(blocks))

            block.register_forward_hook(after, prepend=True)

    def spy(module, name, measure, key):
        original = getattr(module, name)

        def replaced(x, *others, **named):
            measure(x)
            return original(x, *others, **named)

        setattr(module, name, replaced)

    def count(matrices) -> None:
        seen["matrices"] += len(matrices)

    def largest(tensor) -> None:
        seen["piece"] = max(seen["piece"], tensor.nbytes)

    def no_room(path, shapes, pieces, write=engine.tensors.write_safetensors):
        if path.parent.name == checkpoint.name(full):
            next(pieces)  # the others are about to send theirs
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, shapes, pieces)

    engine.tensors.write_safetensors = no_room
    train.update = spied
    spy(optim, "orthogonalise", count, "matrices")
    if sharded:
        spy(torch.distributed, "recv", largest, "piece")
        spy(engine.sharding, "exchange", largest, "piece")
        begun = engine.sharding.shard_learner
        engine.sharding.shard_learner = lambda *a: (begun(*a), watch(a[0]))[0]
    try:
        status = train.main(argv)
    except (ValueError, OSError, SystemExit) as e:
        seen["said"], status = str(e), 2
    report.write_text(json.dumps(seen))
    sys.stdout.flush()
    os._exit(status)


def tensors(run: Path, step: int = 8) -> dict[str, torch.Tensor]:
    path = run / checkpoint.name(step)
    model, moments = (load_file(path / f"{part}.safetensors") for part in ("model", "optimizer"))
    return model | moments


def same_run(one: Path, other: Path) -> None:
    for a, b in zip(rows(one), rows(other), strict=True):
        assert a == {key: pytest.approx(value, abs=1e-4) for key, value in b.items()}
    ours, theirs = tensors(one), tensors(other)
    assert [*ours] == [*theirs]
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


def same_bits(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    for part in ("model", "optimizer"):
        files = [run / checkpoint.name(8) / f"{part}.safetensors" for run in (one, other)]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.fixture(scope="module")
def runs(processes):
    """The same run by one process and, sharded, by two and by four."""
    return {
        1: processes(1, "one"),
        2: processes(2, "two", "--shard=true"),
        4: processes(4, "four", "--shard=true", "--device_batch=1"),
    }


@pytest.mark.parametrize("world", [2, 4])
def test_sharded_processes_train_as_one(runs, world):
    same_run(runs[1][0], runs[world][0])


def test_each_process_keeps_its_part_and_never_sees_the_whole(runs):
    everything = runs[1][1][0]["kept"]
    model = tensors(runs[1][0])
    weights = sum(z.nbytes for n, z in model.items() if "/" not in n)
    of_blocks = sum(z.nbytes for n, z in model.items() if n.startswith("blocks") and "/" not in n)
    for world in (2, 4):
        for seen in runs[world][1]:
            assert 0.9 < seen["kept"] * world / everything < 1.05
            assert 0.9 < seen["gradients"] * world / weights < 1.05
            assert 0 < seen["blocks"] <= of_blocks / 2  # the block at work, and the next one
            assert seen["piece"] <= of_blocks / world
    halves = [max(seen["kept"] for seen in runs[world][1]) for world in (1, 2, 4)]
    assert 1.9 < halves[0] / halves[1] < 2.1 and 1.9 < halves[1] / halves[2] < 2.1


def test_each_matrix_is_made_orthogonal_once_and_not_by_each_process(runs):
    one = runs[1][1][0]["matrices"]
    for world in (2, 4):
        shares = [seen["matrices"] for seen in runs[world][1]]
        assert sum(shares) == one and max(shares) == min(shares)


def test_a_killed_sharded_run_resumes_to_the_same_bits(runs, processes):
    out, _ = processes(2, "killed", "--shard=true", dies=6)
    assert checkpoint.newest(out)[0] == 4
    processes(2, "killed", "--shard=true")
    same_bits(runs[2][0], out)


def test_a_full_disk_ends_all_processes_and_leaves_earlier_checkpoints(runs, processes):
    out, found = processes(2, "full", "--shard=true", full=8)
    assert "step-00000008 could not be saved (No space left" in found[0]["said"]
    assert checkpoint.newest(out)[0] == 4


def test_sharded_and_whole_runs_open_each_others_checkpoints(runs, processes):
    for writer, reader, how in ((2, 1, []), (1, 2, ["--shard=true"])):
        out = processes.folder / f"from {writer} by {reader}"
        shutil.copytree(runs[writer][0], out)
        shutil.rmtree(out / checkpoint.name(8))
        processes(reader, out.name, *how)
        same_run(runs[1][0], out)


def test_data_of_another_machine_must_be_the_same(processes, data, tmp_path):
    """Two machines of one process each: here the second has another copy."""
    other = tmp_path / "other"
    shutil.copytree(data, other)
    shutil.copy(data / "test_000000.bin", other / "val_000000.bin")
    meta = json.loads((other / "meta.json").read_text())
    meta["splits"]["val"] = json.loads(json.dumps(meta["splits"]["test"]).replace("test_", "val_"))
    (other / "meta.json").write_text(json.dumps(meta))
    out, found = processes(2, "elsewhere", copies=(data, other))
    assert "on this machine" in found[1]["said"] and str(other) in found[1]["said"]
    assert not out.exists()


# --- memory


def test_blocks_that_compute_again_give_the_same_bits_in_less_memory(train, monkeypatch):
    more = ["--dropout=0.2", "--n_layer=6", "--canon=3", "--device_batch=auto"]
    peaks = []
    original = memory.pass_bytes
    monkeypatch.setattr(memory, "pass_bytes", lambda *a: peaks.append(original(*a)) or peaks[-1])
    remembers = train("remembers", *more)
    again = train("again", *more, "--checkpoint_activations=true")
    same_bits(remembers, again)
    assert peaks[5] < 0.6 * peaks[2]  # of two windows


@pytest.mark.parametrize("room, most", [(0, 1), (5, 4), (8, 8)])
def test_device_batch_auto_takes_what_memory_there_is(train, monkeypatch, capsys, room, most):
    """`room` is in windows of 1,000 bytes, beside weights. A resumed run keeps what it had."""
    moments = []
    monkeypatch.setattr(memory, "moments", lambda learner: moments.append(learner) or 500)
    monkeypatch.setattr(memory, "pass_bytes", lambda learner, inputs, n, here: 300 + 1000 * n)
    free = (800 + 1000 * room) / memory.SHARE["cpu"]
    monkeypatch.setattr(memory, "free_bytes", lambda here: free + 1)
    run = train("run", "--device_batch=auto", "--steps=4")
    assert f"device_batch=auto: {most} windows in a pass (0.0 MB each" in capsys.readouterr().out
    state, _ = checkpoint.read_state(run / checkpoint.name(4))
    assert state["machine"]["device_batch"] == state["settings"]["device_batch"] == most
    monkeypatch.setattr(memory, "free_bytes", lambda here: 0)
    train("run", "--device_batch=auto")
    said = capsys.readouterr().out
    assert f"device_batch=auto: {most} windows in a pass (as before" in said and " was " in said
    assert isinstance(moments[0], Learner) and len(moments) == 1


@pytest.mark.parametrize(
    "compile, dtype, most", [(False, "bfloat16", 8), (True, "bfloat16", 6), (True, "float32", 4)]
)
def test_a_compiled_pass_has_whole_logits_beside_what_is_tried(monkeypatch, compile, dtype, most):
    """Windows of 3 * 2^20 bytes, and of 2^20 or 2^21 for logits (1,024 x 256) and gradient."""
    monkeypatch.setattr(memory, "pass_bytes", lambda learner, inputs, n, here: n * 3 * 2**20)
    monkeypatch.setattr(memory, "free_bytes", lambda here: 24.5 * 2**20 / memory.SHARE["cpu"])
    learner = torch.nn.Module()
    learner.gpt = SimpleNamespace(config=SimpleNamespace(vocab_size=250))  # padded: 256
    here = Machine(torch.device("cpu"), getattr(torch, dtype), compile, rank=0, world=1, why="")
    found, _ = memory.most_windows(learner, (torch.zeros(24, 1024),), here)
    assert found == most


def test_a_gpu_that_runs_out_of_memory_gets_fewer_windows(monkeypatch):
    """A stub: 12 windows are said to fit, and 3 do."""

    def takes(learner, inputs, windows, here):
        if windows > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1000 * windows

    monkeypatch.setattr(memory, "pass_bytes", takes)
    monkeypatch.setattr(memory, "free_bytes", lambda here: 1e9)
    here = SimpleNamespace(device=SimpleNamespace(type="cuda"), of_each=lambda value: [value])
    here.compile = False
    most, _ = memory.most_windows(torch.nn.Linear(1, 1), (torch.zeros(12, 4),), here)
    assert most == 3
