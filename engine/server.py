"""The server behind serve.py: it begins, streams, and ends.

The event loop talks to clients, in a thread of its own, and never waits for the model.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

import objectives
from engine import guard, inference, inspection, locked, machine, prometheus, protocol
from engine.answers import Answers
from engine.batching import Engine, Full, Request
from engine.checkpoint import find, load_weights
from engine.protocol import Refusal
from engine.transcript import Transcript
from engine.wordfilter import WordFilter
from model import GPT
from tokenizer import Tokenizer

PING = 15  # seconds after which a stream says that it is alive
RETRY = {"Retry-After": "2"}
FINAL = {"x-should-retry": "false"}  # OpenAI's client asks again after 408 and 500, unless told so
STREAM = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
HEADERS = {408: FINAL, 429: RETRY, 500: FINAL, 503: RETRY}
PAGE = Path(__file__).parent / "page.html"


def run(s, keys: list[str], listener: socket.socket) -> int:
    """Serves, by the settings of serve.py, until a signal; a second one is obeyed at once."""
    server, problems = Server(s, *load(s), keys), []

    def serve() -> None:
        try:
            server.serve(listener)
        except BaseException as e:
            problems.append(e)

    thread = threading.Thread(target=serve)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: server.end())
    thread.start()
    server.engine.run()
    thread.join()
    for problem in problems:
        raise problem
    return 0


def load(s) -> tuple[GPT, Tokenizer, Path]:
    """Model, tokenizer and folder of the checkpoint that is asked for. Raises ValueError."""
    folder = find(s.run, s.checkpoint)
    locked.use(s.passphrase_file, folder)
    model, tokenizer, state = load_weights(folder)
    objectives.require_writer(state, s.run)
    return model, tokenizer, folder


class Server:
    """The app, the engine, and the way to the end, for the settings `s` of serve.py.

    `model` and `tokenizer` come from the checkpoint in `folder`; `keys` are digests.
    """

    def __init__(self, s, model: GPT, tokenizer: Tokenizer, folder: Path, keys=()):
        self.s, self.folder = s, folder
        self.words = WordFilter(s.filter) if s.filter else None
        c, name = model.config, s.name or Path(s.run).resolve().name
        here = machine.pick(s.device, s.dtype, "false", rows=s.slots, size=c.parameters())
        model = model.eval().to(here.device, here.dtype)
        machine.use_threads(s.threads, here, model, s.slots)
        size = f"{model.num_parameters():,} parameters, {s.slots} slots of {c.block_size} tokens"
        print(f"machine: {here.why}\n{name}: {size}")
        model = inference.ready(model, s.quantize, s.slots, parts=s.fast)
        self.served = protocol.Served(name, tokenizer, c.block_size, s.slots, s.max_tokens)
        self.engine = Engine(model, tokenizer, s.slots, s.queue, s.chunk, exact=not s.fast)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.draining = False
        self.asked = 0  # requests that are being answered
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/completions", partial(self.answer, chat=False), methods=["POST"]),
            Route("/v1/chat/completions", partial(self.answer, chat=True), methods=["POST"]),
            *inspection.routes(self),
        ]
        handlers = {Refusal: refused, 404: not_served, 405: not_served, Exception: failed}
        app = Starlette(routes=routes, exception_handlers=handlers)
        self.app = guard.Guard(app, keys, guard.names(s.host, s.hosts))

    # --- small answers

    async def page(self, request):
        page = PAGE.read_text(encoding="utf-8")
        return HTMLResponse(page, headers=inspection.page_headers(page))

    async def health(self, request):
        state, status = ("draining", 503) if self.draining else ("ok", 200)
        if not self.engine.running:
            state, status = "the engine has ended", 503
        return JSONResponse({"status": state}, status)

    async def metrics(self, request):
        return PlainTextResponse(prometheus.text(self.engine, self.served.name))

    async def models(self, request):
        data = [self.served.about(name) for name in self.served.models()]
        return JSONResponse(dict(object="list", data=data))

    async def model(self, request):
        return JSONResponse(self.served.about(request.path_params["name"]))

    # --- text

    def clean(self, text: str) -> str:
        """A text of a client. Raises Refusal if it has a word of the filter."""
        if self.words and not self.words.clean(text):
            message = "the text has a word that is not wanted here"
            raise Refusal(message, "prompt", "content_filter")
        return text

    async def checked(self, request, check):
        """What `check` makes of the body of a request. Raises Refusal."""
        if self.draining:
            raise Refusal("the server is about to end", status=503)
        body = protocol.read(await guard.body_of(request))
        # long texts take a while to be encoded
        return await asyncio.get_running_loop().run_in_executor(None, check, body)

    async def answer(self, request, chat: bool):
        """/v1/completions and /v1/chat/completions."""
        check = partial(protocol.check, chat=chat, served=self.served, clean=self.clean)
        ask = await self.checked(request, check)
        requests, queue = self.begin(ask)
        answers, pieces = Answers(ask, self.served.tokenizer), self.pieces(requests, queue)
        if ask.stream:
            return Stream(self.stream(answers, pieces), requests)
        return JSONResponse(await self.unless_gone(request, self.collect(answers, pieces)))

    def begin(self, ask: protocol.Ask) -> tuple[list[Request], asyncio.Queue]:
        """Hands a request to the engine, which tells the queue. Raises Refusal if it is busy."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def tell(piece) -> None:  # in the engine's thread
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(queue.put_nowait, piece)

        of_prompt = ask.echo and ask.top_logprobs is not None
        how = dict(stop=ask.stop, words=self.words, action=self.s.filtered, with_end=of_prompt)
        seed = random.getrandbits(63) if ask.seed is None else ask.seed
        like = dict(n=ask.n, max_tokens=ask.max_tokens, seed=seed, options=ask.options, tell=tell)
        like |= dict(top_logprobs=ask.top_logprobs, of_prompt=of_prompt)
        like |= dict(deadline=time.monotonic() + self.s.timeout)
        requests = []
        for i, (prompt, before) in enumerate(zip(ask.prompts, ask.before, strict=True)):
            transcript = partial(Transcript, self.served.tokenizer, before=before, **how)
            requests.append(Request(prompt, transcript=transcript, first=i * ask.n, **like))
        try:
            self.engine.submit(requests)
        except Full as e:
            message = f"{self.s.queue} answers are waiting already: come back later"
            raise Refusal(message, code="queue_full", status=429) from e
        return requests, queue

    async def pieces(self, requests: list[Request], queue: asyncio.Queue) -> AsyncIterator:
        """Pieces of `requests`, and None whenever none has come for a while. However it ends, the
        engine knows that nobody listens any more."""
        left = sum(request.n for request in requests)
        self.asked += 1
        coming = None  # not wait_for: before Python 3.12 that may swallow a cancellation
        try:
            while left:
                coming = coming or asyncio.ensure_future(queue.get())
                done, _ = await asyncio.wait([coming], timeout=PING)
                if not done:
                    yield None
                    continue
                piece, coming = coming.result(), None
                if isinstance(piece, TimeoutError) and self.draining:
                    raise Refusal("the server ends before the answer does", status=503)
                if isinstance(piece, TimeoutError):
                    late = f"the answer was not ready after {self.s.timeout:g} seconds"
                    raise Refusal(late, code="timeout", status=408)
                if isinstance(piece, Exception):
                    raise Refusal("the model failed: the server's log says why", status=500)
                left -= bool(piece.finish)
                yield piece
        finally:
            self.asked -= 1
            if coming:
                coming.cancel()
            for request in requests:
                request.gone = True

    async def collect(self, answers: Answers, pieces: AsyncIterator) -> dict:
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                if piece:
                    answers.add(piece)
        return answers.whole()

    async def stream(self, answers: Answers, pieces: AsyncIterator) -> AsyncIterator[str]:
        """Server-sent events."""
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

    def ask(self, job):
        """`Engine.ask`. Raises Refusal if it is busy."""
        try:
            return self.engine.ask(job)
        except Full as e:
            raise Refusal("too many are asking: come back later", status=429) from e

    async def unless_gone(self, request, work):
        """What `work` returns; it is cancelled when the client hangs up."""

        async def hung_up() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        both = [asyncio.ensure_future(work), asyncio.ensure_future(hung_up())]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            return both[0].result() if both[0].done() else None  # which nobody reads
        finally:
            for one in both:
                one.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    # --- begin and end

    def serve(self, listener: socket.socket) -> None:
        """Lets clients in at `listener`, a bound socket, until `end` is called; then the engine
        ends, too."""
        s = self.s
        how = dict(http=guard.ImpatientProtocol, ws="none", lifespan="off", log_level="error")
        how |= dict(access_log=False, server_header=False, proxy_headers=False)
        how |= dict(ssl_certfile=s.certificate or None, ssl_keyfile=s.certificate_key or None)
        how |= dict(limit_concurrency=s.connections + 1)  # it counts the one that asks
        self.http = uvicorn.Server(uvicorn.Config(self.app, timeout_graceful_shutdown=2, **how))
        self.http.capture_signals = contextlib.nullcontext  # its own would stop listening at once
        startup = self.http.startup

        async def announced(sockets) -> None:
            self.loop = asyncio.get_running_loop()
            await startup(sockets)
            scheme, port = "https" if s.certificate else "http", listener.getsockname()[1]
            host = f"[{s.host}]" if ":" in s.host else s.host
            print(f"serving on {scheme}://{host}:{port} (Ctrl-C ends)", flush=True)

        self.http.startup = announced
        try:
            asyncio.run(self.http.serve([listener]))
        finally:
            self.engine.stop()

    def end(self) -> None:
        """Refuses new requests, and ends when the running ones have, or after `drain` seconds; at
        once if it is asked for again. For any thread."""
        if self.loop is None:  # it has not begun
            os._exit(130)
        self.loop.call_soon_threadsafe(self.leave if self.draining else self.begin_drain)
        self.draining = True

    def begin_drain(self) -> None:
        self.drained = asyncio.ensure_future(self.drain())  # held, or it might be collected

    async def drain(self) -> None:
        print(f"ending: {self.asked} running, with {self.s.drain:g} seconds for them")
        late = time.monotonic() + self.s.drain
        while self.asked and time.monotonic() < late:
            await asyncio.sleep(0.05)
        self.engine.cut_off()
        while self.asked and time.monotonic() < late + 1:  # they are told
            await asyncio.sleep(0.05)
        self.leave()

    def leave(self) -> None:
        """Ends; answers that nobody has read by now are not sent."""
        self.http.should_exit = True
        if self.asked:
            for connection in [*self.http.server_state.connections]:
                connection.transport.abort()


class Stream(StreamingResponse):
    """Server-sent events of `requests`, given up also if the client is gone before the first."""

    def __init__(self, events: AsyncIterator[str], requests: list[Request]):
        super().__init__(events, media_type="text/event-stream", headers=STREAM)
        self.requests = requests

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for request in self.requests:
                request.gone = True


def event(body: dict) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def refused(request, e: Refusal):
    return JSONResponse(e.body, e.status, HEADERS.get(e.status))


async def not_served(request, e):
    message = f"{request.method} {request.url.path[:80]!r} is not served here"
    return await refused(request, Refusal(message, status=e.status_code))


async def failed(request, e: Exception):
    return await refused(request, Refusal("the server failed: its log says why", status=500))
