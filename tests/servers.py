"""Servers on real sockets, and the two runs that they serve: what the tests of serving share."""

import contextlib
import functools
import json
import threading
import time

import pytest
from conftest import TINY

import prepare
import serve
import train
from engine.batching import Engine

for package in ("starlette", "uvicorn"):
    pytest.importorskip(package)
server = pytest.importorskip("engine.server")  # needs starlette
httpx, openai = pytest.importorskip("httpx"), pytest.importorskip("openai")

LONG = ["--block_size=128", "--batch_tokens=512", "--steps=30"]
JSON = {"Content-Type": "application/json"}
# a connection for each request, and certificates, which take long to read, for none
web = httpx.Client(verify=False, timeout=30, limits=httpx.Limits(max_keepalive_connections=0))


@functools.cache  # one for all files
def trained(out, data):
    out.parent.mkdir()
    (out.parent / "empty.py").write_text("")
    argv = [str(out.parent / "empty.py"), f"--data={data}", f"--out={out}", *TINY, *LONG]
    assert train.main(argv) == 0
    return out


@functools.cache
def conversations(out):
    out.mkdir()
    rows = "".join(f"what is {i}?,it is {i}\n" for i in range(200))
    (out / "rows.csv").write_text("question,answer\n" + rows)
    prepare.main([str(out / "rows.csv"), "--prompt=question", "--answer=answer", "--task=echo",
                  f"--out={out / 'data'}", "--tokenizer=bytes"])  # fmt: skip
    return out / "data"


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """A run of a model of bytes that writes plainly random text."""
    return trained(tmp_path_factory.getbasetemp() / "plain" / "tiny", data)


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A run of a model that has seen two turns of conversation."""
    base = tmp_path_factory.getbasetemp()
    return trained(base / "talker" / "chat", conversations(base / "conversations"))


class Running:
    """A server in two threads of this process."""

    def __init__(self, run, keys=(), **settings):
        settings = dict(device="cpu", threads="1", dtype="float32") | settings
        s = serve.Settings(str(run), port=0, **settings)
        self.server = server.Server(s, *server.load(s), list(keys))
        listener = serve.bound(s)
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        work = [lambda: self.server.serve(listener), self.engine.run]
        self.threads = [threading.Thread(target=target, daemon=True) for target in work]
        for thread in self.threads:
            thread.start()
        wait(lambda: self.server.loop and self.server.http.started)

    def close(self):
        self.server.end()
        self.server.end()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()

    @property
    def engine(self) -> Engine:
        return self.server.engine

    def client(self, key="none", **more):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **more)

    def post(self, path: str, body, headers=None, **more):
        content = body if isinstance(body, (bytes, str)) else json.dumps(body)
        headers = JSON | (headers or {})
        return web.post(self.url + path, content=content, headers=headers, **more)

    def slowly(self, monkeypatch, seconds: float):
        step = self.engine.step
        monkeypatch.setattr(self.engine, "step", lambda: (time.sleep(seconds), step()))


@contextlib.contextmanager
def serving(run, **settings):
    running = Running(run, **settings)
    try:
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def served(run):
    with serving(run, name="tiny") as running:
        yield running


@pytest.fixture(scope="module")
def chat(talker):
    with serving(talker) as running:
        yield running


def wait(condition, seconds: float = 20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
