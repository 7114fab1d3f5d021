"""Who may come in: hosts, origins, keys, the size of a body, and connections that say nothing.

A page in somebody's browser can send requests to 127.0.0.1, too: directly, which its Origin tells,
or under a name of its own that leads there (DNS rebinding), which the Host tells. Keys are drawn at
random and kept as sha256: whoever reads the file has no key.
"""

import asyncio
import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine.protocol import Refusal

BODY = 1_000_000  # bytes
SLOW = 10  # seconds for the head of a request, or for its body
UNREAD = 60  # seconds that an answer may wait to be read
HOST = re.compile(r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?")
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
OPEN = ("/", "/health")  # paths that need no key


def new_key(file: str) -> str:
    """Draws a key and appends its digest to `file`."""
    key = f"sk-{secrets.token_urlsafe(32)}"
    path = Path(file)
    path.touch(mode=0o600)
    with open(path, "ab+") as there:
        there.seek(max(0, there.seek(0, 2) - 1))
        joint = b"" if there.read() in (b"", b"\n") else b"\n"
        there.write(joint + digest(key).encode() + b"\n")
    return key


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(file: str) -> list[str]:
    """The digests in `file`. Raises ValueError for a line that is none."""
    found = []
    for i, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), start=1):
        line = line.split("#")[0].strip()
        if line and not re.fullmatch("[0-9a-f]{64}", line):
            raise ValueError(
                f"{file}, line {i}: not the sha256 of a key: `serve.py --key_file={file} --new_key`"
                " makes a key and appends its own"
            )
        found += [line] if line else []
    if not found:
        raise ValueError(f"{file} has no keys: `serve.py --key_file={file} --new_key` makes one")
    return found


def names(host: str, more: Iterable[str]) -> set[str]:
    """The names under which clients may call a server at `host`; none: any, since it needs keys."""
    more = {name.lower() for name in more}
    if host not in LOOPBACK and not more:
        return set()
    return {*LOOPBACK, f"[{host}]" if ":" in host else host.lower(), *more}


class Guard:
    """Refuses before anything is read. `hosts` are names it answers to; none: any."""

    def __init__(self, app, keys: Iterable[str], hosts: Iterable[str]):
        self.app, self.keys, self.hosts = app, [*keys], {*hosts}

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http":
            try:
                self.admit(scope)
            except Refusal as e:
                more = {"WWW-Authenticate": "Bearer"} if e.status == 401 else {}
                more["Connection"] = "close"  # its body has not been read
                return await JSONResponse(e.body, e.status, more)(scope, receive, send)
        await self.app(scope, receive, send)

    def admit(self, scope) -> None:
        """Raises Refusal."""
        headers = [(name, value.decode("latin-1")) for name, value in scope["headers"]]
        values = dict(headers)
        hosts = [value for name, value in headers if name == b"host"]
        host = HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if not host or (self.hosts and host[1].lower() not in self.hosts):
            raise Refusal("this host is not served here: add it by --hosts", code="host")
        origin = values.get(b"origin")
        if origin is not None and origin.split("://")[-1].lower() != hosts[0].lower():
            raise Refusal("pages of other origins may not ask", code="origin", status=403)
        if scope["method"] == "POST":
            kind = values.get(b"content-type", "").split(";")[0].strip().lower()
            if kind != "application/json":
                raise Refusal("Content-Type has to be application/json", status=415)
            size = values.get(b"content-length", "0")
            if not size.isdecimal() or int(size) > BODY:
                raise Refusal(f"a body may have up to {BODY:,} bytes", status=413)
        if self.keys and scope["path"] not in OPEN:
            scheme, _, key = values.get(b"authorization", "").partition(" ")
            given = hashlib.sha256(key.strip().encode("latin-1")).hexdigest()
            known = [hmac.compare_digest(given, one) for one in self.keys]  # all, whatever is found
            if scheme.lower() != "bearer" or not any(known):
                needed = "a key is needed, as in Authorization: Bearer KEY"
                message = "this key is not known" if key else needed
                raise Refusal(message, code="invalid_api_key", status=401)


async def body_of(request) -> bytes:
    """The body of a request, which may come in chunks. Raises Refusal."""

    async def collect() -> bytes:
        found = bytearray()
        async for chunk in request.stream():
            found += chunk
            if len(found) > BODY:
                raise Refusal(f"a body may have up to {BODY:,} bytes", status=413)
        return bytes(found)

    try:
        return await asyncio.wait_for(collect(), SLOW)
    except ClientDisconnect as e:
        raise Refusal("the client hung up") from e  # which nobody reads
    except asyncio.TimeoutError as e:
        raise Refusal(f"the body did not come within {SLOW} seconds", status=408) from e


class ImpatientProtocol(H11Protocol):
    """HTTP whose connections end if no request comes, or if an answer is not read."""

    stuck = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.wait_for_head()

    def wait_for_head(self) -> None:
        self.hurry = self.loop.call_later(SLOW, self.give_up)

    def give_up(self) -> None:
        if self.cycle is None or self.cycle.response_complete:  # nobody is being answered
            self.transport.close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.hurry.cancel()
        self.wait_for_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stuck = self.loop.call_later(UNREAD, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.stuck:
            self.stuck.cancel()

    def connection_lost(self, exc) -> None:
        self.hurry.cancel()
        if self.stuck:
            self.stuck.cancel()
        super().connection_lost(exc)
