"""What the page shows beside text: the next token's distribution, attention, the run's losses.

Its requests are checked like any other: same keys, same limits, same filter.
"""

import asyncio
import base64
import hashlib
import re
from collections.abc import Generator
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import torch
from starlette.responses import JSONResponse
from starlette.routing import Route

from engine.batching import sees_itself_whole
from engine.metrics import read_metrics
from engine.protocol import Refusal, check, number
from engine.transcript import allowed
from generate import visible
from model import GPT, Attention

CANDIDATES = 64
TEMPERATURES = [round(0.05 * i, 2) for i in range(1, 41)]  # those of the slider; 0 needs no table
WORDS = 96  # of the text whose attention is shown
ROWS = 500  # of metrics


def page_headers(page: str) -> dict[str, str]:
    """A policy: nothing runs but the page's own script, and nobody else is asked."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in found)
        return " ".join(f"'sha256-{digest.decode()}'" for digest in digests)

    policy = f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')};"
    policy += " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
    policy += " frame-ancestors 'none'"
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
    return headers | {"Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}


def routes(server) -> list:
    """The paths of the page, for serve.py's `Server`."""
    served, engine = server.served, server.engine

    async def found(request, check, compute):
        """What `compute` finds for a checked body, step by step between the tokens of others."""
        ask = await server.checked(request, check)
        chunk, tokenizer = engine.chunk, served.tokenizer
        job = compute(engine.model, tokenizer=tokenizer, chunk=chunk, **ask)
        future = asyncio.wrap_future(server.ask(job))
        return JSONResponse(await server.unless_gone(request, future))

    def tokens_of(body: dict) -> list[int]:
        body = body | {"max_tokens": 1, "n": 1}
        ask = check(body, "messages" in body, served, server.clean)
        if len(ask.prompts) > 1:
            raise Refusal("one prompt at a time", "prompt")
        return ask.prompts[0]

    async def following(request):
        def checked(body: dict) -> dict:
            tokens = tokens_of(body)
            return dict(tokens=tokens, words=server.words)

        return await found(request, checked, next_token)

    async def attention(request):
        c = engine.model.config

        def checked(body: dict) -> dict:
            place = dict(layer=number(body, "layer", int, 0, 0, c.n_layer - 1))
            place["head"] = number(body, "head", int, 0, 0, c.n_head - 1)
            return place | dict(tokens=tokens_of(body))

        return await found(request, checked, attention_of)

    async def run(request):
        c = engine.model.config
        file = server.folder.parent / "metrics.jsonl"
        written = file.stat().st_mtime_ns if file.exists() else 0
        loop = asyncio.get_running_loop()
        losses = await loop.run_in_executor(None, losses_of, file.parent, written)
        facts = dict(layers=c.n_layer, heads=c.n_head, context=c.block_size, losses=losses)
        chat = served.tokenizer.markers is not None
        return JSONResponse(facts | dict(chat=chat, models=[*served.models()]))

    return [
        Route("/inspect/next", following, methods=["POST"]),
        Route("/inspect/attention", attention, methods=["POST"]),
        Route("/inspect/run", run),
    ]


@lru_cache(maxsize=1)
def losses_of(run: Path, written: int) -> list[list]:
    """[step, training loss, validation loss] of a run as last `written`, some of each kind."""
    rows = read_metrics(run)
    found = []
    for name in ("loss", "val_loss"):
        some = [row for row in rows if row.get(name) is not None]
        found += some[:: len(some) // ROWS + 1]
    found.sort(key=lambda row: row["step"])
    return [[row["step"], row.get("loss"), row.get("val_loss")] for row in found]


def read_through(model: GPT, tokens: list[int], markers, chunk: int) -> Generator:
    """Reads a text in pieces, one a step, but for what sees itself whole; the last hidden state."""
    text = torch.tensor([tokens], device=model.wte.weight.device)
    if sees_itself_whole(model, tokens, markers):
        return model.trunk(text, visible(model, text.cpu(), markers))[:, -1]
    cache = model.new_cache(1, len(tokens))
    for piece in text.split(chunk, dim=1):
        x = model.trunk(piece, cache=cache)
        yield
    return x[:, -1]


def next_token(model: GPT, tokens: list[int], tokenizer, chunk: int, words) -> Generator:
    """The likeliest next tokens, with their ln p, and what makes them add up at other temperatures.

    At temperature T token i has the probability exp(ln p_i / T - normaliser(T)), exactly, although
    only the likeliest are sent.
    """
    x = yield from read_through(model, tokens, tokenizer.markers, chunk)
    logits = model.logits(x)[0].float()  # (V)
    logits[tokenizer.unused] = -torch.inf
    ln_p = logits.log_softmax(dim=-1)
    best, ids = ln_p.topk(min(CANDIDATES, ln_p.numel() - len(tokenizer.unused)))
    pairs = [*zip(ids.tolist(), best.tolist(), strict=True)]
    if words:
        pairs = allowed(pairs, words, tokenizer, tokenizer.decode(tokens))
    sums = [(ln_p / t).logsumexp(dim=-1).item() for t in TEMPERATURES]
    found = [dict(id=i, text=tokenizer.decode([i]), logprob=p) for i, p in pairs]
    return dict(candidates=found, temperatures=TEMPERATURES, normalisers=sums, prompt=len(tokens))


def attention_of(
    model: GPT, tokens: list[int], tokenizer, chunk: int, layer: int, head: int
) -> Generator:
    """How much each of the last tokens takes from each, in one head: by the book's own formula,
    from the queries and keys of whatever form the layer has."""
    pieces = []
    attn = model.blocks[layer].attn
    reading = read_through(model, tokens, tokenizer.markers, chunk)
    while True:  # others use the model between two steps: the hook is there within a step alone
        hook = attn.register_forward_pre_hook(lambda module, given: pieces.append(given))
        try:
            next(reading)
        except StopIteration:
            break
        finally:
            hook.remove()
        yield
    seen = {"x": torch.cat([x for x, *_ in pieces], dim=1), "mask": pieces[-1][2]}
    if len(pieces) > 1 or not sees_itself_whole(model, tokens, tokenizer.markers):
        seen["mask"] = None  # causal
    ropes = [rope for _, rope, *_ in pieces]
    seen["rope"] = None if ropes[0] is None else [torch.cat(z) for z in zip(*ropes, strict=True)]
    if hasattr(attn, "wqkv"):  # joined, see engine/inference.py
        H, K, D = (getattr(attn.config, n) for n in ("n_head", "n_kv_head", "head_dim"))
        parts = attn.wqkv(seen["x"]).split([H * D, K * D, K * D], dim=-1)
    else:
        parts = [w(seen["x"]) for w in (attn.wq, attn.wk, attn.wv)]

    def keep(weights):
        seen["weights"] = weights
        return weights

    like = dict(wq=lambda _: parts[0], wk=lambda _: parts[1], wv=lambda _: parts[2])
    like |= dict(q_norm=attn.q_norm, k_norm=attn.k_norm, drop=keep, wo=lambda y: y)
    like = SimpleNamespace(config=attn.config, layer=layer, **like)
    Attention.forward(like, seen["x"], seen["rope"], seen["mask"], None)
    weights = seen["weights"][0, head, -WORDS:, -WORDS:]  # (T, T)
    shown = [tokenizer.decode([i]) for i in tokens[-WORDS:]]
    return dict(words=shown, weights=[[round(w, 4) for w in row] for row in weights.tolist()])
