"""Clients for bench.py serve: each asks one request after another, and notes when tokens come."""

import asyncio
import itertools
import json
import math
import statistics
import time

PATIENCE = 300  # seconds for one answer


def run(host: str, port: int, clients: int, requests: int, prompt: int, tokens: int) -> dict:
    """`requests` in all, of `prompt` ids for `tokens` (2 or more): tokens in a second, and
    milliseconds to the first token and between two, each as median and 95th percentile."""
    return asyncio.run(ask_all(host, port, clients, requests, prompt, tokens))


async def ask_all(host, port, clients, requests, prompt, tokens) -> dict:
    first: list[float] = []
    between: list[float] = []
    left = iter(range(requests))

    async def client() -> None:
        for i in left:
            ids = [(i * 7 + j) % 200 for j in range(prompt)]
            times = await asyncio.wait_for(ask(host, port, ids, tokens), PATIENCE)
            first.append(times[1] - times[0])
            between.extend(b - a for a, b in itertools.pairwise(times[1:]))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    speed = requests * tokens / (time.perf_counter() - began)
    return dict(speed=speed, first=spread(first), between=spread(between))


async def ask(host: str, port: int, prompt: list[int], tokens: int) -> list[float]:
    """When a request was sent, and when each of its tokens came."""
    body = dict(prompt=prompt, max_tokens=tokens, temperature=0, stream=True)
    content = json.dumps(body | dict(return_token_ids=True)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    reader, writer = await asyncio.open_connection(host, port)
    times = [time.perf_counter()]
    writer.write(head.encode() + content)
    async for line in reader:
        if line.startswith(b"data: {"):
            times.append(time.perf_counter())
    writer.close()
    if len(times) != tokens + 1:
        raise ValueError(f"{len(times) - 1} tokens came instead of {tokens}")
    return times


def spread(seconds: list[float]) -> list[float]:
    """Median and 95th percentile, in milliseconds."""
    ordered = sorted(seconds)
    return [1e3 * statistics.median(ordered), 1e3 * ordered[math.ceil(0.95 * len(ordered)) - 1]]


def words(found: dict) -> str:
    (a, b), (c, d) = found["first"], found["between"]
    return f"first token {a:,.0f} ms (p95 {b:,.0f}), between tokens {c:,.1f} (p95 {d:,.1f})"
