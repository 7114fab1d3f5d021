"""A prepared folder: what is in it, whether it is there already, and what was put into it."""

import json
import shlex
from collections import Counter
from pathlib import Path

from engine import settings
from engine.files import sha256_of
from engine.shards import split_of, tokenizer_digest
from tokenizer import Tokenizer, find_tokenizer

SPLITS = ("train", "val", "test")


class Folder:
    """A folder that prepare.py has written, or one of public shards (`public`).

    `kind` is text, rows or pairs, `files` lists the shards of each split, `text_bytes` what they
    stand for, where it is known, and `made` the settings it was prepared with. Raises ValueError,
    with the remedy, for anything missing or damaged.
    """

    def __init__(self, name: str):
        self.path, self.kind = Path(name), "text"
        meta = self.path / "meta.json"
        remedy = f"`python prepare.py TEXT --out={name}` prepares a text"
        if not self.path.is_dir():
            raise ValueError(f"there is no data in {name}: {remedy}")
        self.sha256: dict[str, str] = {}  # of each shard, where it was recorded
        self.text_bytes: dict[str, int] = {}  # of each split, likewise
        self.made: dict = dict(source=["TEXT"])
        self.public = not meta.exists()
        if self.public:
            if (self.path / "encoding.json").exists():
                raise ValueError(f"{meta} is missing: prepare the data again")
            names = sorted(path.name for path in self.path.glob("*.bin"))
            self.files = {s: [n for n in names if split_of(n) == s] for s in SPLITS}
            if not self.files["train"]:
                raise ValueError(f"{name} has neither meta.json nor *_train_*.bin: {remedy}")
            return
        try:
            info = json.loads(meta.read_text(encoding="utf-8"))
            expected, self.files = info["tokenizer_sha256"], {}
            self.kind = kind = info.get("kind", "text")
            for split, facts in info["splits"].items():
                self.files[split] = [Path(shard["file"]).name for shard in facts["shards"]]
                if kind == "text":
                    self.text_bytes[split] = int(facts["bytes"])
                self.sha256 |= {shard["file"]: shard["sha256"] for shard in facts["shards"]}
            self.made |= info["settings"]
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{meta} is damaged ({e!r}): prepare the data again") from e
        if tokenizer_digest(self.path) != expected:
            raise ValueError(
                f"the tokenizer files in {name} (encoding.json, vocab.tiktoken) are damaged or"
                " missing: prepare the data again"
            )

    def tokenizer(self, name: str) -> Tokenizer:
        """Its own; of public shards, the one that is called so."""
        if self.public and not name:
            raise ValueError(
                f"{self.path} has no meta.json: name the vocabulary of its shards, as in"
                " --tokenizer=gpt2"
            )
        if self.public:
            return find_tokenizer(name)
        own = Tokenizer.load(self.path)
        if name and find_tokenizer(name).digest() != own.digest():
            raise ValueError(
                f"tokenizer={name!r} is not that of {self.path}, which has its own: leave it out"
            )
        return own

    def command(self, *more: str) -> str:
        """The command that prepares it, with some settings that are different."""
        kept = ("val", "test", "pattern", "field", "encoding", "answer", "task", "group", "seed")
        made = {name: self.made.get(name) for name in (*kept, "filter")}
        off = ("above", "canaries", "images", "lines", "near", "noise", "part", "skip_bad")
        made |= {name: self.made.get(name) or "" for name in off}  # left out where false or 0
        made["filtered"] = self.made.get("filtered") if made["filter"] else ""
        words = ["TEXT" if source == "-" else str(source) for source in self.made["source"]]
        words += [f"--prompt={column}" for column in self.made.get("prompt", ())]
        words += [f"--{name}={value}" for name, value in made.items() if value not in ("", None)]
        return f"python prepare.py {shlex.join([*words, *more])}"

    def paths(self, split: str) -> list[Path]:
        """The shards of a split, all of them there; their content is not looked at."""
        paths = [self.path / file for file in self.files.get(split, [])]
        for path in paths:
            if not path.exists():
                raise ValueError(f"{path} is missing: prepare the data again")
        return paths

    def verify(self, path: Path) -> str:
        """The sha256 of a shard, which has to be the recorded one."""
        found = sha256_of(path)
        if found != self.sha256.get(path.name, found):
            raise ValueError(f"{path} is damaged: its sha256 is not the recorded one")
        return found


class AlreadyPrepared(Exception):
    """There is nothing to do: what has just been read is in the folder already."""


def recorded(s, filter_sha256: str = "") -> dict:
    """The settings that a set depends on, as meta.json has them: there, tuples are lists."""
    free = ("out", "workers", "overwrite")
    made = {name: value for name, value in settings.flat(s).items() if name not in free}
    return json.loads(json.dumps(made | dict(filter_sha256=filter_sha256)))


def made_like(out: Path, meta: dict, defaults: dict, overwrite: bool) -> bool:
    """Whether `out` has the settings of `meta`, and its text, if `meta` tells of it.

    `defaults` are of settings that folders written before do not know. With `overwrite`, what is
    there counts for nothing: False. Raises ValueError if `out` holds anything else, or was made
    otherwise.
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
    rows = meta.get("kind", "text") != "text"
    what = meta["kind"] if rows else "documents"

    def counts(kinds: tuple[str, ...], of: str = "") -> str:
        return ", ".join(f"{report[kind]:,} {kind}{of}" for kind in kinds if report[kind])

    left_out = ("empty", "repeated", "near-duplicate", "unreadable", "unsure", "filtered")
    documents = meta["text"]["documents"] + sum(report[kind] for kind in left_out)
    print(f"read     {documents:,} {what}, {report['bytes read']:,} bytes")
    print(f"removed  {counts(left_out, f' {what}') or f'no {what}'}")
    if report["near-duplicate"]:
        print(f"         {report['crossing']:,} of them would have stood in another split")
    for name, other in (("train", "val"), ("train", "test"), ("val", "test")):
        if report[name, other]:
            print(f"         {report[name, other]:,} {what} of {name}: {other} asks the same")
    if report["asked in test"]:
        print(f"kept     {report['asked in test']:,} {what} of test that were asked elsewhere, too")
    cleaned = ("control characters removed", "pieces brought to NFC", "words masked")
    print(f"cleaned  {counts(cleaned) or 'nothing'}")
    size, ratio = ("", f"tokens/{what[:-1]}") if rows else ("bytes", "bytes/token")
    if part := meta["settings"]["part"]:
        print(f"part     {part} of them, which are:")
    print(f"\n{'split':8} {what:>10} {size:>14} {'tokens':>14} {ratio:>12}")
    for split, facts in meta["splits"].items():
        if tokens := facts["tokens"]:
            size = "" if rows else f"{facts['bytes']:,}"
            ratio = tokens / facts["documents"] if rows else facts["bytes"] / tokens
            print(f"{split:8} {facts['documents']:>10,} {size:>14} {tokens:>14,} {ratio:>12.2f}")
    for task, count in meta["splits"]["train"].get("tasks", {}).items():
        print(f"{task}: {count:,} {what} to learn from")
    print(f"\nwrote {out} in {seconds:.1f} s: {meta['vocab_size']:,} tokens in the vocabulary")
