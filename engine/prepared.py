"""A prepared folder: whether it is there already, and what was put into it."""

import json
from collections import Counter
from pathlib import Path


class AlreadyPrepared(Exception):
    """There is nothing to do: what has just been read is in the folder already."""


def made_like(out: Path, meta: dict, defaults: dict, overwrite: bool) -> bool:
    """Whether `out` has the settings of `meta`, and its text, if `meta` tells of it.

    `defaults` are of settings that folders written before do not know. With `overwrite` it is never
    enough. Raises ValueError if `out` holds anything else, or was made otherwise.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        made = json.loads((out / "meta.json").read_text(encoding="utf-8"))
        old = defaults | made["settings"]
        text = made.get("text") or {"bytes": sum(s["bytes"] for s in made["splits"].values())}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{out} exists and is no prepared data: choose another --out") from e
    if overwrite:
        return False
    remedy = "choose another --out, or replace it with --overwrite"
    differing = {k: old.get(k) for k, v in meta["settings"].items() if old.get(k) != v}
    if differing:
        values = ", ".join(map(repr, differing.values()))
        names = " and ".join(differing)
        raise ValueError(f"{out} was made with another {names} ({values}): {remedy}")
    new = meta.get("text", text)
    if any(new[k] != value for k, value in text.items()):
        sizes = [k for k in ("documents", "bytes") if k in text]
        then, now = (", ".join(f"{facts[k]:,} {k}" for k in sizes) for facts in (text, new))
        raise ValueError(f"{out} was made from another text ({then} then, {now} now): {remedy}")
    known = made.get("tokenizer_sha256")
    if meta.get("tokenizer_sha256", known) != known:
        raise ValueError(f"{out} was made with another tokenizer of that name: {remedy}")
    return True


def print_table(out: Path, meta: dict, report: Counter, seconds: float) -> None:
    kinds = ("empty documents", "repeated documents", "unreadable documents")
    removed = [f"{report[k]:,} {k}" for k in kinds if report[k]]
    documents = meta["text"]["documents"] + sum(report[k] for k in kinds)
    print(f"read     {documents:,} documents, {report['bytes read']:,} bytes")
    print(f"removed  {', '.join(removed) or 'no documents'}")
    cleaned = [k for k in ("control characters removed", "pieces brought to NFC") if report[k]]
    print(f"cleaned  {', '.join(f'{report[k]:,} {k}' for k in cleaned) or 'nothing'}")
    print(f"\n{'split':8} {'documents':>10} {'bytes':>14} {'tokens':>14} {'bytes/token':>12}")
    for split, facts in meta["splits"].items():
        if facts["tokens"]:
            ratio = facts["bytes"] / facts["tokens"]
            print(
                f"{split:8} {facts['documents']:>10,} {facts['bytes']:>14,}"
                f" {facts['tokens']:>14,} {ratio:>12.2f}"
            )
    print(f"\nwrote {out} in {seconds:.1f} s: {meta['vocab_size']:,} tokens in the vocabulary")
