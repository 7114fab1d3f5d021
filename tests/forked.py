"""Scripts in processes of their own that begin at once: forked from one that has loaded torch.

A new Python needs several seconds for that, and the tests start dozens. What a process does while
it begins is not seen in these: tests of that start a new Python.
"""

import contextlib
import functools
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import forkserver, popen_fork
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
context = multiprocessing.get_context("forkserver")
LOADED = ["torch.distributed.fsdp", "torch._dynamo", "safetensors.torch", "regex", "tiktoken"]
LOADED += ["forked", "prepare", "train", "evaluate", "sample", "serve"]
LOADED += ["engine.preflight", "engine.run", "engine.opening", "engine.sources", "engine.spool"]
LOADED += ["objectives.next_token", "generate", "speculate"]  # what scripts load when they need it
context.set_forkserver_preload(LOADED)


@functools.cache
def server_begins() -> None:
    """With our folders on its path, wherever the test stands that asks first: what it does not find
    it leaves out without a word, and each process would load it anew."""
    with mock.patch.dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}"):
        forkserver.ensure_running()


class Forked:
    """A script that runs, or with "-m" a module, with the part of subprocess.Popen's interface that
    the tests need; stdout and stderr are one. `before` is called in its process first."""

    def __init__(self, *argv, env=None, before: Callable | None = None, stdin=os.devnull):
        reading, writing = context.Pipe(duplex=False)
        arguments = (writing, [*map(str, argv)], os.environ | (env or {}), before, str(stdin))
        server_begins()
        self.process = context.Process(target=work, args=arguments, daemon=True)
        self.process.start()
        self.pid = self.process.pid
        writing.close()
        self.stdout = os.fdopen(os.dup(reading.fileno()), encoding="utf-8")
        reading.close()

    def poll(self) -> int | None:
        return self.process.exitcode

    returncode = property(poll)

    def wait(self, timeout: float = 120) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def communicate(self, timeout: float = 120) -> tuple[str, None]:
        said = self.stdout.read()  # until the last process that could write has ended
        self.wait(timeout)
        return said, None


def work(writing, argv: list[str], env: dict, before: Callable | None, stdin: str) -> None:
    """What the forked process does."""
    for number in (1, 2):
        os.dup2(writing.fileno(), number)
    writing.close()
    run_script(argv, env, before, stdin)


def run_script(argv: list[str], env: dict, before: Callable | None = None, stdin: str = os.devnull):
    """Python's command line, in this process."""
    sys.stdin = open(stdin, encoding="utf-8")
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(env)
    if before:
        before()
    module = argv[0] == "-m"
    sys.argv = argv[module:]
    if module:
        sys.modules.pop(argv[1], None)  # or runpy warns
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(ROOT / argv[0]), run_name="__main__")  # which may be absolute


def torchrun(*argv, env=None, restarts: int = 0, anew: bool = False) -> Forked:
    """Two processes of a script that torchrun looks after. Unless they begin `anew`, as Pythons of
    their own, it forks them from its own process: its children all the same, in a session of their
    own, with no handler of a signal."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launcher += [f"--max-restarts={restarts}", *argv]
    return Forked(*launcher, env=env, before=None if anew else fork_children)


def fork_children() -> None:
    """torchrun in this process forks where it would start Pythons."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    def fork(self, command: tuple, env: dict) -> popen_fork.Popen:
        return popen_fork.Popen(multiprocessing.Process(target=begin, args=(command, env)))

    SubprocessHandler._popen = fork


def begin(command: tuple, env: dict) -> None:
    """What a process does that torchrun has forked."""
    python, unbuffered, *argv = command
    assert (python, unbuffered) == (sys.executable, "-u")
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_script(argv, env, before=lambda: sys.stdout.reconfigure(write_through=True))


def run(*argv, status: int = 0, **options) -> str:
    """What a script says, once it has ended with that status."""
    return said(Forked(*argv, **options), status)


def said(process: Forked, status: int = 0) -> str:
    """The same, of one that has begun."""
    text, _ = process.communicate()
    assert process.returncode == status, text
    return text


def environments(world: int) -> list[dict]:
    """What torchrun would tell each of `world` processes."""
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    shared = dict(MASTER_ADDR="localhost", MASTER_PORT=port, WORLD_SIZE=str(world))
    shared |= dict(LOCAL_WORLD_SIZE=str(world))
    return [shared | dict(RANK=str(i), LOCAL_RANK=str(i)) for i in range(world)]


def together(world: int, *argv) -> str:
    """What `world` processes say that train as one, once all of them have ended well."""
    processes = [Forked(*argv, env=env) for env in environments(world)]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, said
    return "".join(said)
