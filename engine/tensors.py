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
    found = {}
    for path in files_of(folder):
        try:
            with safe_open(path, "pt") as f:  # the header is compared with the file's size
                for name in sorted(f.keys()):
                    whole = name if name.startswith((prefix, "lm_head.")) else prefix + name
                    if whole in found:
                        raise ValueError(f"{path} is damaged: it has a second tensor {name}")
                    part = f.get_slice(name)
                    found[whole] = Stored(path, name, part.get_shape(), part.get_dtype())
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{path} is missing, damaged or cut short ({e})") from e
    return found


def files_of(folder: Path) -> list[Path]:
    """The files with the weights of a model."""
    one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if one.exists():
        return [one]
    if index.exists():
        shards = read_json(index).get("weight_map")
        shards = list(shards.values()) if isinstance(shards, dict) else [shards]
        for shard in shards:
            if not isinstance(shard, str) or PureWindowsPath(shard).name != shard:
                raise ValueError(f"{index} is damaged: it names {shard!r}, no file beside it")
        return [folder / shard for shard in sorted(set(shards))]
    for path in folder.iterdir():
        if path.suffix in PICKLES:
            raise ValueError(
                f"{path} is a pickle, which could run any program, so it is not read: convert it"
                " where you trust it, with transformers: AutoModelForCausalLM"
                f".from_pretrained({str(folder)!r}).save_pretrained('converted')"
            )
    raise ValueError(f"{folder} has no {one.name} and no {index.name}")


def write_safetensors(path: Path, shapes: dict[str, list[int]], tensors: Iterable) -> None:
    """Writes tensors of these shapes, in this order, as float32, holding one at a time. Each may
    come in parts, one after the other.

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
            f.write(tensor.float().contiguous().cpu().numpy())
        assert f.tell() == 8 + len(text) + size, "parts that do not add up to these shapes"
