"""Devices that are not here (by stubs), threads, processes as one, and Muon in small numbers."""

import math
import os
import re
import signal
import subprocess
import sys
import time

import forked
import pytest
import torch
from conftest import ROOT, TINY

from engine import machine, threads
from engine.metrics import read_metrics
from optim import orthogonalise

pytestmark = pytest.mark.cpu


@pytest.fixture
def gpus(monkeypatch):
    """gpus(n, capability): pretends that there are n GPUs. Returns the devices asked about."""

    def pretend(count: int, capability=(8, 0)) -> list:
        asked = []

        def get_device_capability(device=None):
            asked.append(device)
            return capability

        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)
        monkeypatch.setattr("torch.cuda.get_device_capability", get_device_capability)
        return asked

    return pretend


# --- devices


@pytest.mark.parametrize("device, index", [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_one_gpu_starts_without_torchrun(gpus, monkeypatch, device, index):
    asked, used = gpus(2), []
    # what torch.cuda.set_device does first: it refuses a device without an index
    needs_index = torch.cuda._utils._get_device_index
    monkeypatch.setattr("torch.cuda.set_device", lambda device: used.append(needs_index(device)))
    here = machine.pick(device)
    machine.start(here, deterministic=False)
    assert used == [index]
    assert here.dtype == torch.bfloat16
    assert asked and all(needs_index(d) == index for d in asked)  # of the chosen GPU, not the first


def test_more_processes_than_gpus_is_said_by_all(gpus, monkeypatch):
    gpus(4)
    for rank in range(8):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 8)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
        with pytest.raises(ValueError, match="8 processes and 4 GPUs: use --nproc_per_node=4"):
            machine.pick()


def test_each_process_has_its_gpu(gpus, monkeypatch):
    gpus(4)
    for name, value in dict(RANK=7, LOCAL_RANK=3, WORLD_SIZE=8, LOCAL_WORLD_SIZE=4).items():
        monkeypatch.setenv(name, str(value))
    assert machine.pick().device == torch.device("cuda:3")


@pytest.mark.parametrize("device", ["cuda:9", "cuda:x", "cuda", "mps", "tpu", "meta"])
def test_devices_that_are_not_here_are_named(gpus, device):
    if device == "cuda:9":
        gpus(2)
    with pytest.raises(ValueError, match=re.escape(device)):
        machine.pick(device)


def test_old_gpus_train_in_float16_and_are_not_compiled_for(gpus):
    gpus(1, capability=(6, 1))
    here = machine.pick()
    assert here.dtype == torch.float16 and not here.compile


def test_the_machine_line_fits_100_columns(gpus, monkeypatch):
    for capability in (None, (6, 1), (7, 5), (9, 0)):
        if capability:
            gpus(8, capability)
        for fast in (True, False):
            monkeypatch.setattr(machine, "fast_bfloat16", lambda fast=fast: fast)
            for here in (machine.pick(), machine.pick(rows=1, size=10**9)):
                why = here.why.replace("1 process", "1024 processes")
                assert len(f"machine: {why}") <= 100, why


# --- number types


@pytest.mark.parametrize(
    "able, rows, size, dtype",
    [
        (dict(avx2=True, avx512_bf16=True), 1, 10**9, torch.bfloat16),
        (dict(avx512_bf16=True), 1, 10**9, torch.bfloat16),
        (dict(avx2=True, avx512_bf16=True), 1, 10**6, torch.float32),
        (dict(avx2=True, avx512_bf16=True), 0, 0, torch.bfloat16),
        (dict(avx2=True, avx512_bf16=True), 8, 10**6, torch.bfloat16),
        (dict(avx2=True), 1, 10**9, torch.bfloat16),  # reads half as much, and widens as it reads
        (dict(avx2=True), 1, 10**6, torch.float32),  # widening takes longer than reading
        (dict(avx2=True), 8, 10**9, torch.float32),  # would emulate its products
        (dict(avx2=True), 0, 0, torch.float32),  # training
        (dict(), 1, 10**9, torch.float32),
    ],
)
def test_generating_takes_the_faster_number_type(monkeypatch, able, rows, size, dtype):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: able)
    assert machine.pick("cpu", rows=rows, size=size).dtype == dtype


def test_a_prompt_is_not_read_in_emulated_bfloat16(monkeypatch):
    from engine import linear as layers

    given = torch.randn(8, 4).bfloat16(), torch.randn(8).bfloat16()
    x = torch.randn(3, 4).bfloat16()
    expected = layers.StreamedLinear(*given)(x)
    seen = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        "torch.nn.functional.linear", lambda x, *a: seen.append(x.dtype) or linear(x, *a)
    )
    monkeypatch.setattr(layers, "fast_bfloat16", lambda: False)
    layer = layers.StreamedLinear(*given)
    assert torch.allclose(layer(x).float(), expected.float(), atol=0.05)
    assert seen == [torch.float32]


@pytest.mark.parametrize("rms", [1e-4, 1e-7, 1e-12])
def test_small_gradients_move_as_far_in_float16(rms):
    g = torch.randn(2, 64, 192, generator=torch.Generator().manual_seed(0))
    expected = orthogonalise(g)
    error = orthogonalise(g * rms, dtype=torch.float16).float() - expected
    assert error.norm() / expected.norm() < 0.01


def test_orthogonalising_does_what_its_table_says():
    rows = re.findall(r"^ +([\d.]+) +([\d. ]+)$", orthogonalise.__doc__, re.MULTILINE)
    begins = [float(begin) for begin, _ in rows]
    assert len(begins) >= 5 and 0.001 in begins
    for i, begin in enumerate(begins):
        # a second singular value makes the norm 1, so that nothing is scaled
        g = torch.diag(torch.tensor([begin, (1 - begin**2) ** 0.5], dtype=torch.float64))[None]
        for steps, want in enumerate(map(float, rows[i][1].split()), start=1):
            found = orthogonalise(g, steps, torch.float64)[0, 0, 0].item()
            assert found == pytest.approx(want, abs=6e-4), (begin, steps)


# --- threads


COMMANDS = [
    path.name
    for path in ROOT.glob("*.py")
    if "settings.run(main)" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("set_by_user", [None, "active"])
def test_threads_know_how_to_wait_before_torch_is_loaded(command, set_by_user, tmp_path):
    """In each command, at the moment at which it or a module of it asks for torch first."""
    (tmp_path / "torch.py").write_text(
        "import os; e = os.environ; os.write(1, e.get('OMP_WAIT_POLICY', "
        "'spin ' + e.get('GOMP_SPINCOUNT', 'none')).encode()); os._exit(0)"
    )
    code = f"import {command[:-3]}; import torch"
    known = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    env = {k: v for k, v in os.environ.items() if k not in known}
    env |= {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    if set_by_user:
        env["OMP_WAIT_POLICY"] = set_by_user
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    expected = (set_by_user,) if set_by_user else ("passive", "spin 3000")
    assert done.stdout.endswith(expected), done.stdout + done.stderr


@pytest.mark.parametrize(
    "running, cores, granted, idle",
    [(1, 2, 2.0, True), (2, 2, 2.0, False), (9, 16, 16.0, False), (1, 16, 8.0, False)],
)
def test_threads_spin_only_where_as_many_cores_are_idle(
    running, cores, granted, idle, tmp_path, monkeypatch
):
    (tmp_path / "loadavg").write_text(f"0.20 0.18 0.12 {running}/80 11206")
    monkeypatch.setattr(
        threads.os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False
    )
    monkeypatch.setattr(threads.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(threads, "quota", lambda: granted)
    assert threads.cores_are_idle(path=str(tmp_path / "loadavg")) is idle
    assert threads.cores_are_idle(path=str(tmp_path / "missing")) is False


def test_small_work_gets_one_thread_and_large_work_all():
    assert threads.choose(8, tokens=256, width=32, parameters=40_000) == 1
    assert threads.choose(8, tokens=8 * 512, width=768, parameters=124_000_000) == 8
    assert threads.choose(8, tokens=1, width=768, parameters=124_000_000) == 8  # decoding
    between = [threads.choose(64, tokens, 128, 1_300_000) for tokens in (256, 2048, 8192, 65536)]
    assert between == sorted(between) and between[0] < between[-1]


@pytest.mark.parametrize(
    "groups, files, cores",
    [
        ("0::/a/b", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5),
        ("0::/a", {"a/cpu.max": "max 100000"}, float("inf")),
        (
            "5:memory:/x\n4:cpu,cpuacct:/docker/1",  # in a container the path is the host's
            {"cpu,cpuacct/cpu.cfs_quota_us": "50000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "1"}, float("inf")),
        (None, {}, float("inf")),  # not Linux
    ],
)
def test_a_container_has_the_cores_that_it_was_given(tmp_path, monkeypatch, groups, files, cores):
    for name, content in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    if groups:
        (tmp_path / "membership").write_text(groups + "\n")
    found = threads.quota(str(tmp_path / "cgroup"), str(tmp_path / "membership"))
    assert found == cores
    monkeypatch.setattr(threads, "quota", lambda: found)
    assert threads.choose(4, 10**6, 10**3, 10**9) == math.ceil(min(4, cores))


@pytest.fixture
def free_threads(monkeypatch, threads_in_name):
    """As if OMP_NUM_THREADS were not set, on a machine of four cores."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "AVAILABLE", 4)
    monkeypatch.setattr(threads, "quota", lambda: float("inf"))


@pytest.mark.slow
def test_what_compiles_nothing_loads_no_compiler(data, tmp_path):
    run = ["--n_layer=1", "--n_embd=32", "--n_head=2", "--block_size=16", "--steps=2"]
    calls = [
        ("train", [f"--data={data}", f"--out={tmp_path / name}", f"--optimizer={name}", *run])
        for name in ("muon", "nadamw")
    ]
    calls += [("sample", [str(tmp_path / "muon"), "--prompt=a", "--max_tokens=2"])]
    calls += [("evaluate", [str(tmp_path / "muon")])]
    code = f"""import importlib, sys
for name, argv in {calls!r}:
    importlib.import_module(name).main(argv)
    print(f"\\n{{name}} has loaded it: {{'torch._dynamo' in sys.modules}}")"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loaded = re.findall(r"has loaded it: (\w+)", done.stdout)
    assert loaded == ["False"] * 4, done.stdout + done.stderr


def test_one_thread_works_alone_while_that_is_faster():
    choice = threads.AllOrOne()

    def together(times: int, seconds_of_all: float) -> int:
        """Of so many times, how often all threads had the work, which takes one two seconds."""
        count = 0
        for _ in range(times):
            both = choice.together()
            choice.took(both, seconds_of_all if both else 2.0)
            count += both
        return count

    assert together(256, 1.0) == 254  # all but two, one of them early
    assert 2 <= together(256, 4.0) <= 12  # beside a busy process, which is noticed soon
    assert together(256, 1.0) >= 100  # and soon forgotten
    choice = threads.AllOrOne()
    assert together(2_000, 0.1) == 1_998  # the dearer a trial, the rarer
    choice.took(True, 9.0)  # by chance
    assert together(20, 0.1) == 20
    choice = threads.AllOrOne()
    for _ in range(3):
        choice.together()  # and Ctrl-C: nothing is known
    assert together(256, 1.0) >= 250


def test_the_number_of_threads_is_kept_on_resume(train, capsys, free_threads):
    from engine.checkpoint import load_weights

    def used(run, step: int) -> int:
        return load_weights(run / f"step-{step:08d}")[2]["machine"]["threads"]

    run = train("run", "--threads=3", "--steps=4")
    assert "tokens a step, 3 threads\n" in capsys.readouterr().out
    assert used(run, 4) == 3
    train("run", "--steps=8")  # auto alone would take one
    assert "threads was" not in capsys.readouterr().out
    assert used(run, 8) == 3
    train("run", "--steps=12", "--threads=2")
    assert "threads was 3, is 2: the same data, but not the same bits" in capsys.readouterr().out
    assert used(run, 12) == 2
    assert used(train("other", "--steps=4"), 4) == 1
    assert "tokens a step, 1 thread\n" in capsys.readouterr().out


def test_omp_num_threads_is_obeyed(train, monkeypatch, free_threads, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)  # as torch does when it is loaded
    train("run", "--steps=4")
    assert "2 threads\n" in capsys.readouterr().out


@pytest.mark.parametrize("threads", ["0", "-1", "many", "1.5", ""])
@pytest.mark.parametrize("command", ["train", "sample"])
def test_a_number_of_threads_that_cannot_be_is_refused(command, threads):
    module = __import__(command)
    argv = ["out/none" if command == "sample" else "config/small.py", f"--threads={threads}"]
    with pytest.raises(ValueError, match="threads=.* auto or a number"):
        module.main(argv)


# --- processes


SUMS = """
import sys
import torch, torch.distributed as dist
from torch import nn
from engine import machine
machine.BUCKET = 3000
here = machine.pick("cpu", "float32")
machine.start(here, False)
torch.manual_seed(0)
model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(8)], nn.Linear(16, 100))
unused = nn.Parameter(torch.ones(5))  # in the second process only
parameters = [unused, *model.parameters()]
x = torch.randn(2, 4, 16)[here.rank]

def backward():
    loss = model(x).square().sum()
    if here.rank == 0:
        loss = loss + unused.sum()
    loss.backward()

backward()
backward()  # two micro-batches
expected = []
for p in parameters:
    g = torch.zeros_like(p) if p.grad is None else p.grad.clone()
    dist.all_reduce(g)
    expected.append(g)
    p.grad = None

calls, early = [], []
real = dist.all_reduce
def counted(t, **how):
    calls.append(t.numel())
    return real(t, **how)
dist.all_reduce = counted
sums = machine.GradientSum(parameters)
model[0].register_full_backward_pre_hook(lambda *_: early.append(len(calls)))
for _ in range(2):  # two steps
    calls.clear(), early.clear()
    sums.active = False
    backward()
    assert not calls, "a micro-batch before the last one sends nothing"
    sums.active = True
    backward()
    sums.wait()
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, expected)), "the sums"
    assert sum(calls) == sum(p.numel() for p in parameters), calls
    assert 1 < len(calls) < len(parameters) / 2, calls
    assert early[1] > 1, early  # some were under way before the pass had ended
    for p in parameters:
        p.grad = None
sys.stdout.write(f"equal in {here.rank}\\n")
"""


def test_gradients_are_summed_in_buckets_during_the_backward_pass(tmp_path):
    (tmp_path / "sums.py").write_text(SUMS)
    output = forked.together(2, tmp_path / "sums.py")
    assert sorted(re.findall(r"equal in \d", output)) == ["equal in 0", "equal in 1"], output


FAULTS = """
import os, sys
import dataset
import train
from engine import settings, stop
stop.GRACE = 0.1 if [os.environ["RANK"]] == [*FAULTY] else 60.0  # however late torchrun looks
good = dataset.Split.batch
def batch(self, step, *others):
    if step == 3 and os.environ["RANK"] in FAULTY:
        raise MISTAKE
    return good(self, step, *others)
dataset.Split.batch = batch
sys.argv[0] = "train.py"
settings.run(train.main)
"""


@pytest.mark.parametrize(
    "mistake, faulty, said",
    [
        ("RuntimeError('CUDA out of memory. Tried')", "1", "rank 1: out of memory: use a smaller"),
        ("OSError(5, 'Input/output error', 'x.bin')", "01", "x.bin: Input/output error"),
    ],
)
def test_a_mistake_of_any_process_is_said_once(data, tmp_path, mistake, faulty, said):
    (tmp_path / "empty.py").write_text("")
    code = FAULTS.replace("MISTAKE", mistake).replace("FAULTY", repr(faulty))
    (tmp_path / "faults.py").write_text(code)
    argv = [tmp_path / "empty.py", f"--data={data}", f"--out={tmp_path / 'run'}", *TINY]
    env = {"PYTHONPATH": str(ROOT)}
    output = forked.said(forked.torchrun(tmp_path / "faults.py", *argv, env=env), status=1)
    errors = re.findall(r"^train.py: error: (.*)$", output, re.MULTILINE)
    assert len(errors) == 1 and errors[0].startswith(said), output
    assert "[rank" not in output  # as torch begins the lines of a traceback
    culprit = re.search(r"Root Cause.*?exitcode +: (\d+)", output, re.DOTALL)
    assert culprit and culprit[1] == "2", output


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's death")
def test_the_end_of_the_launcher_saves_and_ends_the_run(data, tmp_path):
    """SIGUSR1 kills torchrun, which knows nothing of it; its processes must not go on alone."""
    (tmp_path / "empty.py").write_text("")
    out = tmp_path / "run"
    argv = [tmp_path / "empty.py", f"--data={data}", f"--out={out}", *TINY]
    argv += ["--steps=1000000", "--save_every=1000000", "--eval_every=1000000"]
    launcher = forked.torchrun(ROOT / "train.py", *argv, anew=True)
    children = []
    while not read_metrics(out):
        assert launcher.poll() is None
        time.sleep(0.05)
        listed = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True)
        children = [int(pid) for pid in listed.stdout.split()]
    try:
        launcher.send_signal(signal.SIGUSR1)
        launcher.wait()
        deadline = time.monotonic() + 60
        while any(alive(pid) for pid in children) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(children) == 2 and not any(alive(pid) for pid in children)
        assert list(out.glob("step-*/manifest.json"))
    finally:
        for pid in filter(alive, children):
            os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"  # a zombie is not
    except OSError:
        return False
