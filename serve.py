"""A model for others: python serve.py out/small, then http://127.0.0.1:8000 or any OpenAI client.

    from openai import OpenAI
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.completions.create(model="small", prompt="def ", max_tokens=50)

    guard.py ── server.py ── protocol.py ── batching.py    all in engine/
    who may     begin, end,   what may       answers side
    come in     streams       be asked       by side

docs/serve.md has what is promised, what it is not for, and figures.
"""

from engine import console

if __name__ == "__main__":
    console.leave_quietly()

import os
import re
import socket
import ssl
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from engine import settings
from engine.settings import AboveZero, Bound, Count, NotNegative, Positive

Port = Annotated[int, Bound("from 0 to 65535; 0 is any that is free", lambda p: 0 <= p <= 65535)]
Name = Annotated[str, Bound("without : and spaces", re.compile(r"[^:\s]*").fullmatch)]


@dataclass
class Settings:
    run: str = "out/small"  # folder of a run, or one checkpoint of it
    checkpoint: str = "best"  # of a run: best (lowest validation loss), latest, or a step
    passphrase_file: str = ""  # opens locked weights, in memory alone: a file with the passphrase
    name: Name = ""  # what clients call the model; by default the name of the folder
    host: str = "127.0.0.1"  # address to listen on; others than this machine's own need a key_file
    port: Port = 8000  # port to listen on
    hosts: tuple = ()  # a further name of this machine; may be given several times
    key_file: str = ""  # digests of the keys that may come in
    new_key: bool = False  # draw a key, print it, append its digest to key_file, and end
    certificate: str = ""  # file of a TLS certificate, in PEM
    certificate_key: str = ""  # file of its private key
    filter: str = ""  # file of words that must not come in or go out
    filtered: Literal["stop", "mask"] = "stop"  # what a word does to an answer: end or become stars

    slots: Positive = 8  # answers that are written side by side
    max_tokens: Count = 0  # the most that an answer may have; 0: what the context holds
    queue: Positive = 64  # answers that may wait for a slot; more are told to come back
    chunk: Positive = 128  # tokens of prompts that are read between two tokens of the others
    connections: Positive = 256  # clients that may be connected at once
    timeout: AboveZero = 600.0  # seconds that an answer may take, waiting included
    drain: NotNegative = 30.0  # seconds in which running answers may end, after SIGTERM or Ctrl-C

    quantize: settings.Quantize = ""  # int8: weights of eight bits, on a CPU: faster, less exact
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
        settings.require(s.key_file, s, "key_file", "given with new_key: it gets the key's digest")
        print(guard.new_key(s.key_file))
        print(f"This key is shown once; {s.key_file} has its digest.", file=sys.stderr)
        return 0
    here = s.host in guard.LOOPBACK
    outside = "given for an address that others can reach: --new_key --key_file=keys.txt makes one"
    settings.require(here or s.key_file, s, "key_file", outside)
    masks = "stop without a --filter, of whose words it says what they do"
    settings.require(s.filter or s.filtered == "stop", s, "filtered", masks)
    pair = bool(s.certificate) == bool(s.certificate_key)
    both = "given beside certificate, and the other way round"
    settings.require(pair, s, "certificate_key", both)
    for name in ("certificate", "certificate_key", "filter", "key_file"):
        path = getattr(s, name)
        settings.require(not path or Path(path).is_file(), s, name, "a file that exists")
    if s.certificate:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(s.certificate, s.certificate_key)
        except ssl.SSLError as e:
            names = f"certificate={s.certificate!r} and certificate_key={s.certificate_key!r}"
            raise ValueError(f"{names} do not make a pair in PEM ({e.reason})") from e
    keys = guard.read_keys(s.key_file) if s.key_file else []
    if not here and not s.certificate:
        print("note: without --certificate (or a proxy with TLS) keys and texts travel in clear")
    listener = bound(s)
    from engine import server

    return server.run(s, keys, listener)


def bound(s: Settings) -> socket.socket:
    """A socket with the address; nobody is let in before the model is there. Raises ValueError."""
    try:
        listener = socket.socket(socket.AF_INET6 if ":" in s.host else socket.AF_INET)
        if os.name == "posix":  # one that has just ended does not keep the address
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((s.host, s.port))
    except OSError as e:
        raise ValueError(f"{s.host}:{s.port} cannot be listened on ({e.strerror})") from e
    return listener


if __name__ == "__main__":
    settings.run(main)
