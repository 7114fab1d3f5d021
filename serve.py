"""A model for others: python serve.py out/small, then http://127.0.0.1:8000 or any OpenAI client.

    from openai import OpenAI
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.completions.create(model="small", prompt="def ", max_tokens=50)

    HTTP ── engine/guard.py ── engine/protocol.py ── engine/batching.py ── generate.py
            who may come in     what may be asked     side by side          the model

The event loop talks to clients and never waits for the model, which has a thread of its own.
docs/serve.md has what is promised, what it is not for, and figures.
"""

from engine import console

if __name__ == "__main__":
    console.leave_quietly()

import asyncio
import contextlib
import json
import random
import signal
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import objectives
from engine import settings
from engine.settings import AboveZero, Bound, NotNegative, Positive

PING = 15  # seconds after which a stream says that it is alive
RETRY = {"Retry-After": "2"}
STREAM = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
PAGE = Path(__file__).parent / "engine" / "page.html"

Port = Annotated[int, Bound("from 0 to 65535; 0 is any that is free", lambda p: 0 <= p <= 65535)]
Quantize = Annotated[str, Bound("int8 or left out", ("", "int8").__contains__)]


@dataclass
class Settings:
    run: str = "out/small"  # folder of a run, or one checkpoint of it
    checkpoint: str = "best"  # of a run: best (lowest validation loss), latest, or a step
    passphrase_file: str = ""  # opens locked weights, in memory alone: a file with the passphrase
    name: str = ""  # what clients call the model; by default the name of the folder
    host: str = "127.0.0.1"  # address to listen on; others than this machine's own need a key_file
    port: Port = 8000  # of that address
    hosts: tuple = ()  # further names by which clients may call this machine
    key_file: str = ""  # digests of the keys that may come in
    new_key: bool = False  # draw a key, print it, append its digest to key_file, and end
    certificate: str = ""  # file of a TLS certificate, in PEM
    certificate_key: str = ""  # file of its private key
    filter: str = ""  # file of words that must not come in or go out
    filtered: Literal["stop", "mask"] = "stop"  # what a word does to an answer: end or become stars

    slots: Positive = 8  # answers that are written side by side
    queue: Positive = 64  # answers that may wait for a slot; more are told to come back
    chunk: Positive = 128  # tokens of prompts that are read between two tokens of the others
    connections: Positive = 256  # at once
    timeout: AboveZero = 600.0  # seconds that an answer may take, waiting included
    drain: NotNegative = 30.0  # seconds in which running answers may end, after SIGTERM or Ctrl-C

    quantize: Quantize = ""  # int8: weights of eight bits, on a CPU; faster, slightly higher loss
    device: settings.Device = "auto"  # auto, cpu, mps, cuda, or one GPU such as cuda:1
    dtype: settings.DType = "auto"  # of the weights and of matrix products
    threads: settings.Threads = "auto"  # of a CPU: a number, or chosen by the size of the model
    fast: bool = True  # false: model.py itself, and equal text whoever stands beside


def main(argv: list[str]) -> int:
    s = settings.load(Settings, argv, "Serve a model over HTTP.", "run")
    for package in ("starlette", "uvicorn", "h11"):
        settings.require_package(package, True)
    from engine import guard

    if s.new_key:
        settings.require(s.key_file, s, "key_file", "the file that gets the key's digest")
        print(f"{guard.new_key(s.key_file)}\nThis key is shown once; {s.key_file} has its digest.")
        return 0
    here = s.host in guard.LOOPBACK
    outside = "given for an address that others can reach: --new_key --key_file=keys.txt makes one"
    settings.require(here or s.key_file, s, "key_file", outside)
    both = bool(s.certificate) == bool(s.certificate_key)
    settings.require(
        both, s, "certificate_key", "given beside certificate, and the other way round"
    )
    for name in ("certificate", "certificate_key", "filter", "key_file"):
        path = getattr(s, name)
        settings.require(not path or Path(path).is_file(), s, name, "a file that exists")
    keys = guard.read_keys(s.key_file) if s.key_file else []
    if not here and not s.certificate:
        print("note: without --certificate (or a proxy with TLS) keys and texts travel in clear")
    try:
        family = socket.AF_INET6 if ":" in s.host else socket.AF_INET
        listener = socket.create_server((s.host, s.port), family=family)
    except OSError as e:
        raise ValueError(f"{s.host}:{s.port} cannot be listened on ({e.strerror})") from e
    return asyncio.run(Server(s, keys).run(listener))


class Server:
    """The app, the engine, and the way to the end: one object, so that tests can have it."""

    def __init__(self, s: Settings, keys: list[str]):
        from engine import inference, machine
        from engine.batching import Engine
        from engine.checkpoint import find, load_weights
        from engine.protocol import Served
        from engine.wordfilter import WordFilter

        self.s = s
        self.words = WordFilter(s.filter) if s.filter else None
        self.folder = find(s.run, s.checkpoint)
        model, tokenizer, state = load_weights(self.folder)
        objectives.require_writer(state, s.run)
        c = model.config
        here = machine.pick(s.device, s.dtype, "false", rows=s.slots)
        model = model.eval().to(here.device, here.dtype)
        machine.use_threads(s.threads, here, model, s.slots)
        name = s.name or Path(s.run).resolve().name
        print(f"machine: {here.why}")
        size = f"{model.num_parameters():,} parameters, {s.slots} slots of {c.block_size} tokens"
        print(f"{name}: {size}")
        model = inference.ready(model, s.quantize, s.slots, parts=s.fast)
        self.served = Served(name, tokenizer, c.block_size, s.slots)
        self.engine = Engine(model, tokenizer, s.slots, s.queue, s.chunk, exact=not s.fast)
        self.draining = False
        self.asked = 0  # requests that are being answered
        self.app = self.routes(keys)

    def routes(self, keys: list[str]):
        from starlette.applications import Starlette
        from starlette.responses import JSONResponse
        from starlette.routing import Route

        from engine import inspection
        from engine.guard import LOOPBACK, Guard
        from engine.protocol import Refusal

        async def refused(request, e):
            return JSONResponse(e.body, e.status, RETRY if e.status in (429, 503) else None)

        async def other(request, e):  # of starlette: no such path, no such method
            message = f"{request.method} {request.url.path[:80]!r} is not served here"
            return JSONResponse(Refusal(message, status=e.status_code).body, e.status_code)

        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/completions", partial(self.answer, chat=False), methods=["POST"]),
            Route("/v1/chat/completions", partial(self.answer, chat=True), methods=["POST"]),
            *inspection.routes(self),
        ]
        handlers = {Refusal: refused, 404: other, 405: other}
        app = Starlette(routes=routes, exception_handlers=handlers)
        loopback = self.s.host in LOOPBACK
        hosts = {name.lower() for name in self.s.hosts}
        hosts |= {*LOOPBACK, self.s.host} if loopback or hosts else set()
        return Guard(app, keys, hosts)

    # --- small answers

    async def page(self, request):
        from starlette.responses import HTMLResponse

        from engine import inspection

        page = PAGE.read_text(encoding="utf-8")
        return HTMLResponse(page, headers=inspection.page_headers(page))

    async def health(self, request):
        from starlette.responses import JSONResponse

        state, status = ("draining", 503) if self.draining else ("ok", 200)
        if not self.engine.is_alive():
            state, status = "the engine has ended", 503
        return JSONResponse({"status": state}, status)

    async def metrics(self, request):
        from starlette.responses import PlainTextResponse

        from engine import prometheus

        return PlainTextResponse(prometheus.text(self.engine, self.served.name))

    async def models(self, request):
        from starlette.responses import JSONResponse

        return JSONResponse(self.served.list())

    # --- text

    def clean(self, text: str) -> str:
        """A text of a client. Raises Refusal if it has a word of the filter."""
        from engine.protocol import Refusal

        if self.words and not self.words.clean(text):
            raise Refusal("the text has a word that is not wanted here", code="content_filter")
        return text

    async def checked(self, request, check):
        """What `check` makes of the body of a request. Raises Refusal."""
        from engine import guard, protocol

        if self.draining:
            raise protocol.Refusal("the server is about to end", status=503)
        body = protocol.read(await guard.body_of(request))
        # long texts take a while to be encoded
        return await asyncio.get_running_loop().run_in_executor(None, check, body)

    async def answer(self, request, chat: bool):
        """/v1/completions and /v1/chat/completions."""
        from starlette.responses import JSONResponse, StreamingResponse

        from engine import protocol

        check = partial(protocol.check, chat=chat, served=self.served, clean=self.clean)
        ask = await self.checked(request, check)
        pieces = self.begin(ask)
        answers = protocol.Answers(ask, self.served.tokenizer)
        if ask.stream:
            stream = self.stream(answers, pieces)
            return StreamingResponse(stream, media_type="text/event-stream", headers=STREAM)
        body = await self.unless_gone(request, self.collect(answers, pieces))
        return JSONResponse(body)

    def begin(self, ask) -> AsyncIterator:
        """Hands a request to the engine; its pieces, as they come. Raises Refusal if it is busy."""
        from engine.batching import Full, Request
        from engine.protocol import Refusal
        from engine.transcript import Transcript
        from engine.wordfilter import Gate

        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def tell(piece) -> None:  # in the engine's thread
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(queue.put_nowait, piece)

        tokenizer = self.served.tokenizer

        def transcript(prompt: list[int]) -> Transcript:
            before = tokenizer.decode(prompt) if self.words and not ask.chat else ""
            return Transcript(tokenizer, ask.stop, Gate(self.words, self.s.filtered, before))

        seed = random.getrandbits(63) if ask.seed is None else ask.seed
        requests = [
            Request(
                prompt,
                ask.n,
                ask.most,
                seed,
                ask.options,
                partial(transcript, prompt),
                tell,
                first=i * ask.n,
                alternatives=ask.alternatives,
                of_prompt=ask.of_prompt,
                deadline=time.monotonic() + self.s.timeout,
            )
            for i, prompt in enumerate(ask.prompts)
        ]
        try:
            self.engine.submit(requests)
        except Full as e:
            message = f"{self.s.queue} answers are waiting already: come back later"
            raise Refusal(message, code="queue_full", status=429) from e
        return self.pieces(requests, queue)

    async def pieces(self, requests: list, queue: asyncio.Queue) -> AsyncIterator:
        """Pieces of `requests`, and None whenever none has come for a while. However it ends, the
        engine knows that nobody listens any more."""
        from engine.protocol import Refusal

        left = sum(request.n for request in requests)
        self.asked += 1
        try:
            while left:
                try:
                    piece = await asyncio.wait_for(queue.get(), PING)
                except asyncio.TimeoutError:
                    piece = None
                if isinstance(piece, TimeoutError):
                    late = f"the answer was not ready after {self.s.timeout:g} seconds"
                    raise Refusal(late, code="timeout", status=408)
                if isinstance(piece, Exception):
                    raise Refusal(f"the model failed: {piece}", status=500)
                left -= bool(piece and piece.finish)
                yield piece
        finally:
            self.asked -= 1
            for request in requests:
                request.gone = True

    def ask(self, function):
        """`Engine.ask`. Raises Refusal if it is busy."""
        from engine.batching import Full
        from engine.protocol import Refusal

        try:
            return self.engine.ask(function)
        except Full as e:
            raise Refusal("too many are asking: come back later", status=429) from e

    async def collect(self, answers, pieces) -> dict:
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                if piece:
                    answers.add(piece)
        return answers.whole()

    async def stream(self, answers, pieces) -> AsyncIterator[str]:
        """Server-sent events."""
        from engine.protocol import Refusal

        try:
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    if piece is None:
                        yield ": still here\n\n"
                        continue
                    for chunk in answers.chunks(piece):
                        yield event(chunk)
            if answers.ask.usage:
                yield event(answers.last())
            yield "data: [DONE]\n\n"
        except Refusal as e:  # the status has been sent
            yield event(e.body)

    async def unless_gone(self, request, work):
        """What `work` returns; it is cancelled when the client hangs up."""

        async def hung_up() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        both = [asyncio.ensure_future(work), asyncio.ensure_future(hung_up())]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if both[0].done():
                return both[0].result()
            return None  # nobody reads it
        finally:
            for one in both:
                one.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    # --- begin and end

    async def run(self, listener: socket.socket) -> int:
        import uvicorn

        from engine.guard import ImpatientProtocol

        s = self.s
        config = uvicorn.Config(
            self.app,
            http=ImpatientProtocol,
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=s.connections,
            timeout_graceful_shutdown=2,
            ssl_certfile=s.certificate or None,
            ssl_keyfile=s.certificate_key or None,
        )
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # it would stop listening at once
        loop = asyncio.get_running_loop()
        ending: list[asyncio.Task] = []

        def end(*_) -> None:
            if ending:  # for the second time
                server.should_exit = server.force_exit = True
            ending.append(loop.create_task(self.drain(server)))

        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda *_: loop.call_soon_threadsafe(end))
        self.engine.start()
        scheme, address = "https" if s.certificate else "http", listener.getsockname()
        host = f"[{s.host}]" if ":" in s.host else s.host
        print(f"serving on {scheme}://{host}:{address[1]} (Ctrl-C ends)")
        await server.serve([listener])
        self.engine.stop()
        self.engine.join()
        return 0

    async def drain(self, server) -> None:
        """New requests are refused, running ones may end, and then the server does."""
        self.draining = True
        print(f"draining: {self.asked} requests have {self.s.drain:g} seconds to end")
        late = time.monotonic() + self.s.drain
        while self.asked and time.monotonic() < late:
            await asyncio.sleep(0.05)
        server.should_exit = True


def event(body: dict) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


if __name__ == "__main__":
    settings.run(main)
