"""Tensors in safetensors files, of which only one at a time is in memory; and JSON beside them."""

import json
from collections.abc import Iterable
from math import prod
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.files import require_space

FLOATS = ("F32", "F16", "BF16")
PICKLES = (".bin", ".pt", ".pth")


class Stored(NamedTuple):
    """A tensor in a file."""

    path: Path
    name: str
    shape: list[int]
    kind: str  # F32 and the like

    def read(self) -> Tensor:
        """The tensor itself, memory-mapped."""
        with safe_open(self.path, "pt") as f:  # anew for each: what was read is let go of
            return f.get_tensor(self.name)


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path} is missing or damaged ({e})") from e
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it should begin with a brace")
    return content


def find(folder: Path, prefix: str) -> dict[str, Stored]:
    """The tensors of a model. Raises ValueError if a file is missing or damaged.

    Their names begin with `prefix`, all but the head's, whether they do in the file or not.
    """
    one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    shards = {one.name}
    if not one.exists() and index.exists():
        shards = read_json(index).get("weight_map")
        shards = set(shards.values()) if isinstance(shards, dict) else {None}
    elif not one.exists():
        for path in folder.iterdir():
            if path.suffix in PICKLES:
                raise ValueError(
                    f"{path} is a pickle, which could run any program, so it is not read: convert"
                    " it where you trust it, with transformers: AutoModelForCausalLM"
                    f".from_pretrained({str(folder)!r}).save_pretrained('converted')"
                )
        raise ValueError(f"{folder} has no {one.name} and no {index.name}")
    for shard in shards:
        if not isinstance(shard, str) or PureWindowsPath(shard).name != shard:
            raise ValueError(f"{index} is damaged: its weight_map has {shard!r}, no file beside it")
    found = {}
    for path in [folder / shard for shard in sorted(shards)]:
        if not path.exists():
            raise ValueError(f"{path} is missing, though {index.name} names it")
        try:
            with safe_open(path, "pt"), open(path, "rb") as f:  # the header fits the file's size
                header = f.read(int.from_bytes(f.read(8), "little"))
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{path} is damaged or cut short ({e})") from e
        for name, facts in json.loads(header, object_pairs_hook=list):  # no dict: names may recur
            whole = name if name.startswith((prefix, "lm_head.", "__")) else prefix + name
            if whole in found:
                raise ValueError(f"{path} is damaged: it has a second tensor {name}")
            if name != "__metadata__":
                facts = dict(facts)
                found[whole] = Stored(path, name, facts["shape"], facts["dtype"])
    return found


def write_safetensors(path: Path, shapes: dict[str, list[int]], tensors: Iterable) -> None:
    """Writes tensors of these shapes, in this order, as float32, holding one at a time.

    The header's length in 8 bytes, the header, the numbers: github.com/huggingface/safetensors.
    """
    header, size = {}, 0
    for name, shape in shapes.items():
        header[name] = dict(dtype="F32", shape=shape, data_offsets=[size, size + 4 * prod(shape)])
        size += 4 * prod(shape)
    require_space(path.parent, size)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            f.write(tensor.float().contiguous().numpy())
