"""What a Transformer keeps of the text that it has read: see decode_one_token in generate.py.

Shapes: B texts, T new positions, S positions attended to, K key/value heads, D channels of a head.
"""

import copy

import torch
from torch import Tensor

from shape import GPTConfig


class KVCache:
    """Keys and values of all positions so far, preallocated for `size` (0: the whole context).

    Tokens that have been read never change their keys and values, since they see nothing that is
    read later: with these stored, only the new token passes through the layers, and looks back at S
    of them. It costs memory for 2 n_layer K D `size` numbers a text, and with canon layers
    2 n_layer C `size` more. Each row is a slot for a text, of any length:

        slot 0   A l l _ m e n      lengths 7, 2, 0: a mask hides what is left behind a text's end,
        slot 1   N o - - - - -      from the text that had the slot before
        slot 2   - - - - - - -

    A forward pass calls `begin`, and each of its layers `append`; then it adds T to `lengths`.
    """

    fixed = False  # whether all rows have to be computed, also those that hold nothing

    def __init__(
        self,
        config: GPTConfig,
        batch: int,
        device=None,
        dtype=torch.float32,
        size: int = 0,
        whole: bool = False,
    ):
        size = size or config.block_size
        shape = (config.n_layer, batch, config.n_kv_head, size, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        # for canon.py alone, else empty: what each module has read, see `behind`; a text begins
        # after `reach` zeros
        self.reach = max(0, config.canon - 1)
        past = (2 * config.n_layer, batch, self.reach + size, config.n_embd)
        past = past if self.reach else (0, batch, 0, 0)
        self.past = torch.zeros(past, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.long)  # (B), on the CPU: Python asks for them
        self.whole = whole  # S is always `size`, and not only as far as the longest text goes

    def begin(self, T: int) -> tuple[Tensor, Tensor | None]:
        """Makes room for T more tokens in each row: their positions, and the mask of `Attention`.

        Texts of one length stand at the same positions (T), and the mask is None, causal; others at
        (B, T), with a mask (B, 1, T, S) for each. Raises ValueError if they do not fit.
        """
        shortest, longest = (int(n) for n in self.lengths.aminmax())
        size, device = self.k.size(3), self.k.device
        if longest + T > size:
            raise ValueError(f"{longest + T} positions do not fit in a KV cache of {size}")
        self.end = size if self.whole else longest + T  # S
        self.at = None
        if shortest == longest and not self.whole:
            return torch.arange(longest, self.end, device=device), None
        self.at = (self.lengths[:, None] + torch.arange(T)).to(device)  # (B, T)
        mask = torch.arange(self.end, device=device) <= self.at[..., None]  # (B, T, S)
        return self.at, mask[:, None]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k and v (B, K, T, D) of one layer and returns all of its k and v (B, K, S, D)."""
        for stored, new in ((self.k[layer], k), (self.v[layer], v)):
            if self.at is None:
                stored[:, :, self.end - new.size(2) : self.end] = new
            else:  # each row at a place of its own
                at = self.at[:, None, :, None].expand_as(new)
                stored.scatter_(2, at, new.to(stored.dtype))
        return self.k[layer, :, :, : self.end], self.v[layer, :, :, : self.end]

    def behind(self, site: int, x: Tensor) -> Tensor:
        """Stores x (B, T, C), what the module `site` reads of the new tokens, and returns it behind
        what it has read of the `reach` tokens before: (B, reach + T, C)."""
        T, past = x.size(1), self.past[site]
        if self.at is None:
            past[:, self.reach + self.end - T : self.reach + self.end] = x
            return past[:, self.end - T : self.reach + self.end].to(x.dtype)
        places = self.at[:, :1] + torch.arange(self.reach + T, device=x.device)
        places = places[..., None].expand(-1, -1, x.size(2))
        past.scatter_(1, places[:, self.reach :], x.to(past.dtype))
        return past.gather(1, places).to(x.dtype)

    def take(self, rows: list[int]) -> None:
        """Row i becomes a copy of what row rows[i] was: to repeat, drop, or reorder texts."""
        self.k = self.k[:, rows]
        self.v = self.v[:, rows]
        self.past = self.past[:, rows]
        self.lengths = self.lengths[rows]

    def first(self, count: int) -> "KVCache":
        """The first `count` rows alone: the same memory, so that what is appended there is here."""
        return self if count == len(self.lengths) else self.rows(0, count)

    def rows(self, begin: int, end: int) -> "KVCache":
        """Rows from `begin` to `end`, in the same memory."""
        part = copy.copy(self)
        part.k, part.v = self.k[:, begin:end], self.v[:, begin:end]
        part.past = self.past[:, begin:end]
        part.lengths = self.lengths[begin:end]
        return part

    def move(self, row: int, to: int) -> None:
        """Copies the text in `row` to another row."""
        end = int(self.lengths[row])
        self.k[:, to, :, :end] = self.k[:, row, :, :end]
        self.v[:, to, :, :end] = self.v[:, row, :, :end]
        self.past[:, to, : self.reach + end] = self.past[:, row, : self.reach + end]
        self.lengths[to] = self.lengths[row]

    def put(self, rows: list[int], other: "KVCache") -> None:
        """Texts of another cache, one for each of `rows` or one for all, take these slots; the
        other slots stay as they are."""
        end = int(other.lengths.max())
        self.k[:, rows, :, :end] = other.k[:, :, :, :end]
        self.v[:, rows, :, :end] = other.v[:, :, :, :end]
        self.past[:, rows, : self.reach + end] = other.past[:, :, : self.reach + end]
        self.lengths[rows] = other.lengths
