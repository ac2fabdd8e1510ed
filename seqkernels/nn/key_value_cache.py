"""A cache of keys and values for decoding: of a dtype of its own, contiguous or in pages.

Dimensions: B sequences, H key heads, T new steps, D and Dv columns of keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional._autograd import recorded
from ..functional._checks import describe
from ..functional._values import may_read_values, tracing
from ..functional.attention import attend_to_rows, scaled_dot_product_attention
from ..reference.attention import dequantize_rows, quantize_rows

__all__ = ["KeyValueCache"]

_DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16


class KeyValueCache:
    """Keys and values of previous steps, preallocated for `capacity` steps. Inference only.

    Args:
        batch_size: B. capacity: the largest number of steps of a sequence.
        num_heads: H. head_dim: D. value_dim: Dv; D if None.
        dtype: of the stored numbers. On a CPU, keys and values of another dtype are converted: float32, bfloat16 and
            float16 are rounded to nearest; int8 stores a row of a head as its largest absolute number divided by 127,
            float32, and the quotients, rounded to nearest. Attention reads the rows as they are stored and computes in
            float32. float64 stores and reads float64 only.
        page_size: number of steps of a page, on a CPU in eager mode: a sequence then occupies the pages that it needs,
            and `reorder` shares pages rather than copying rows. None: one block of `capacity` steps per sequence.
        pages: number of pages of all sequences; enough for `capacity` steps of each if None.

    Attributes:
        keys: [B, H, capacity, D], or [pages, H, page_size, D]. values: the same of Dv columns.
        key_scales, value_scales: with int8, float32 [B, H, capacity] or [pages, H, page_size]; None otherwise.
        block_table: with pages, int32 [B, n]: step t is row t % page_size of page block_table[b, t // page_size].
        lengths: int64 [B], number of steps of each sequence.
        longest: upper bound of `lengths`.
        They are read-only: `append`, `reorder` and `reset` change them.

    Deterministic: yes; the bits of a query do not depend on the batch, the padding, the pages or the number of threads.
    """

    def __init__(
        self,
        batch_size: int,
        capacity: int,
        num_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        page_size: int | None = None,
        pages: int | None = None,
    ) -> None:
        caller = "KeyValueCache"
        for name, size, least in (
            ("batch_size", batch_size, 0),
            ("capacity", capacity, 0),
            ("num_heads", num_heads, 1),
            ("head_dim", head_dim, 1),
            ("value_dim", head_dim if value_dim is None else value_dim, 1),
            ("page_size", 1 if page_size is None else page_size, 1),
            ("pages", 0 if pages is None else pages, 0),
        ):
            if not isinstance(size, (int, torch.SymInt)) or isinstance(size, bool):
                raise TypeError(f"{caller}: {name} must be an int, got {size!r}")
            if size < least:
                raise ValueError(f"{caller}: {name} must be at least {least}, got {size}")
        where = torch.get_default_device() if device is None else torch.device(device)
        for name, given in (("dtype torch.int8", dtype == torch.int8), ("page_size", page_size is not None)):
            if given and where.type not in ("cpu", "meta"):
                raise NotImplementedError(
                    f"{caller}: {name} is supported on a CPU, got device {where}; no kernel of other devices reads it"
                )
        if page_size is None:
            if pages is not None:
                raise ValueError(f"{caller}: pages must be None without page_size, got {pages}")
            sizes, self.block_table, self._pages = (batch_size, num_heads, capacity), None, None
        else:
            each = -(-capacity // page_size)
            pages = batch_size * each if pages is None else pages
            sizes = pages, num_heads, page_size
            self.block_table = torch.zeros(batch_size, each, device=device, dtype=torch.int32)
            self._pages = _Pages(pages, page_size, batch_size)
        self._capacity = capacity
        self.keys = torch.zeros(*sizes, head_dim, device=device, dtype=dtype)
        self.values = torch.zeros(*sizes, head_dim if value_dim is None else value_dim, device=device, dtype=dtype)
        self.key_scales: Tensor | None = None
        self.value_scales: Tensor | None = None
        if dtype == torch.int8:
            self.key_scales = torch.zeros(sizes, device=device)
            self.value_scales = torch.zeros(sizes, device=device)
        elif self.keys.dtype not in _DTYPES:
            raise TypeError(f"{caller}: dtype must be float32, float64, bfloat16, float16 or int8, got {dtype}")
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.int64)
        self.longest = 0
        self.ragged = False  # whether lengths may differ

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def batch_size(self) -> int:
        return self.lengths.shape[0]

    def append(self, key: Tensor, value: Tensor, lengths: Tensor | Sequence[int] | None = None) -> None:
        """Appends key [B, H, T, D] and value [B, H, T, Dv].

        lengths: [B] number of valid steps of each sequence; T if None.
        """
        _check_tensors(key=key, value=value)
        caller, T, B = "KeyValueCache", key.shape[2] if key.dim() == 4 else -1, self.batch_size
        for name, t, of in (("key", key, self.keys), ("value", value, self.values)):
            H, D = of.shape[1], of.shape[3]
            if t.dim() != 4 or (t.shape[0], t.shape[1], t.shape[3]) != (B, H, D):
                raise ValueError(f"{caller}: {name} must have shape [{B}, {H}, T, {D}], got {list(t.shape)}")
            if t.shape[2] != T:
                raise ValueError(f"{caller}: value must have as many steps as key, {T}, got {t.shape[2]}")
            if (t.dtype != of.dtype or of.dtype == torch.int8) and not _converts(t, of):
                wanted = (
                    "float32, bfloat16 or float16" if of.dtype == torch.int8 else f"of the cache's dtype {of.dtype}"
                )
                raise TypeError(f"{caller}: {name} must be {wanted}, got {t.dtype}")
            if t.device != of.device:
                raise ValueError(f"{caller}: {name} must be on the cache's device {of.device}, got {t.device}")
            if torch.is_grad_enabled() and t.requires_grad:
                raise RuntimeError(f"{caller}: {name} must not require a gradient; decode under torch.no_grad()")
        if self._pages is None and self.longest + T > self.capacity:
            raise ValueError(
                f"{caller}: steps must fit the capacity of {self.capacity}, got {T} after {self.longest} cached steps"
            )
        if lengths is not None and not isinstance(lengths, Tensor):
            lengths = torch.tensor(list(lengths), dtype=torch.int64, device=self.keys.device)
        if lengths is not None:
            if lengths.shape != (B,):
                raise ValueError(f"{caller}: lengths must have shape [B] = [{B}], got {list(lengths.shape)}")
            if lengths.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"{caller}: lengths must be int32 or int64, got {lengths.dtype}")
            known = lengths.device.type == "cpu" and may_read_values(lengths) and B > 0
            if known and not 0 <= int(lengths.min()) <= int(lengths.max()) <= T:
                raise ValueError(f"{caller}: lengths must be between 0 and the {T} steps, got {lengths.tolist()}")
        if self._pages is not None:
            self._append_to_pages(key, value, T, lengths)
            return
        for buffer, scales, new in (
            (self.keys, self.key_scales, key),
            (self.values, self.value_scales, value),
        ):
            rows, of_rows = _stored(new, buffer)
            if self.ragged or lengths is not None:
                # Padding is also written, after the end of its sequence, where the next steps overwrite it.
                at = self.lengths.unsqueeze(1) + torch.arange(T, device=self.keys.device)  # [B, T]
                of_batch = torch.arange(B, device=self.keys.device).unsqueeze(1)
                buffer[of_batch, :, at] = rows.transpose(1, 2)
                if scales is not None and of_rows is not None:
                    scales[of_batch, :, at] = of_rows.transpose(1, 2)
            else:
                buffer[:, :, self.longest : self.longest + T] = rows
                if scales is not None and of_rows is not None:
                    scales[:, :, self.longest : self.longest + T] = of_rows
        self.lengths = self.lengths + (T if lengths is None else lengths)
        self.ragged = self.ragged or lengths is not None
        self.longest += T
        if lengths is not None and known:
            self.longest = int(self.lengths.max())

    def attend(
        self,
        query: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        scale: float | None = None,
        window: int | tuple[int, int] | None = None,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
    ) -> Tensor:
        """Attention of query [B, Hq, Tq, D] to the cached steps; Hq is a multiple of H.

        Args: as scaled_dot_product_attention with enable_gqa and, with is_causal, causal_alignment="lower_right": the
            last query has the position of the last step. attn_mask broadcasts to [B, Hq, Tq, longest].
            lengths: [B] number of queries of each sequence.
        Returns:
            [B, Hq, Tq, Dv], dtype of query. Gradient: no, for caches of another dtype than that of query or in pages.
        """
        _check_tensors(query=query)
        caller = "KeyValueCache"
        B, H, D = self.batch_size, self.keys.shape[1], self.keys.shape[3]
        if query.dim() != 4 or query.shape[0] != B or query.shape[3] != D or H == 0 or query.shape[1] % H:
            raise ValueError(
                f"{caller}: query must have shape [{B}, a multiple of {H}, Tq, {D}], got {list(query.shape)}"
            )
        if query.dtype != self.keys.dtype and not _converts(query, self.keys):
            raise TypeError(f"{caller}: query must be of the cache's dtype {self.keys.dtype}, got {query.dtype}")
        alignment = "lower_right" if is_causal else "upper_left"
        known = self.lengths if self.ragged or self._pages is not None else None
        if isinstance(lengths, Sequence):
            lengths = torch.tensor(list(lengths), dtype=torch.int64, device=query.device)
        if self.is_plain(query.dtype):
            of = known if lengths is None else (lengths, self.lengths)
            S = self.longest
            out: Tensor = scaled_dot_product_attention(
                query, self.keys[:, :, :S], self.values[:, :, :S], attn_mask, 0.0, is_causal, scale, True, lengths=of,
                causal_alignment=alignment, window=window, softcap=softcap, alibi_slopes=alibi_slopes,
            )  # fmt: skip
            return out
        if recorded(query, attn_mask):
            raise RuntimeError(f"{caller}: query must not require a gradient; decode under torch.no_grad()")
        keys, values, key_scales, value_scales = self.keys, self.values, self.key_scales, self.value_scales
        if self._pages is None:
            keys, values = keys[:, :, : self.longest], values[:, :, : self.longest]
            if key_scales is not None and value_scales is not None:
                key_scales, value_scales = key_scales[:, :, : self.longest], value_scales[:, :, : self.longest]
        return attend_to_rows(
            caller, query, keys, values, key_scales, value_scales, self.block_table, attn_mask,
            (lengths, known), self.longest, is_causal=is_causal, causal_alignment=alignment, scale=scale,
            window=window, softcap=softcap, alibi_slopes=alibi_slopes,
        )  # fmt: skip

    def is_plain(self, dtype: torch.dtype) -> bool:
        """Whether `keys` and `values` are inputs of scaled_dot_product_attention beside a query of this dtype."""
        return self._pages is None and self.keys.dtype == dtype

    def gathered(self) -> tuple[Tensor, Tensor]:
        """Keys [B, H, longest, D] and values [B, H, longest, Dv]; float32 if the cache is of int8.

        Without pages and int8 they are views of the cache.
        """
        found = []
        for rows, scales in ((self.keys, self.key_scales), (self.values, self.value_scales)):
            if self.block_table is not None and self._pages is not None:
                used = self.block_table[:, : -(-self.longest // self._pages.size)].long()
                rows = rows[used].transpose(1, 2).flatten(2, 3)
                scales = None if scales is None else scales[used].transpose(1, 2).flatten(2, 3)
            rows = rows[:, :, : self.longest]
            found.append(rows if scales is None else dequantize_rows(rows, scales[:, :, : self.longest]))
        return found[0], found[1]

    def reorder(self, index: Tensor) -> None:
        """Replaces sequence b by sequence index[b], for beam search.

        index: int64, [B]; or of another size N, and the cache then has N sequences. Only the cached steps are copied;
        with pages, none: sequences share pages until they append different steps.
        """
        caller, B = "KeyValueCache", self.batch_size
        _check_tensors(index=index)
        if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{caller}: index must be int64 of one dimension, got {describe(index)}")
        if index.is_cpu and may_read_values(index) and not all(0 <= b < B for b in index.tolist()):
            raise IndexError(f"{caller}: index must be in [0, {B}), got {index.tolist()}")
        self.lengths = self.lengths.index_select(0, index)
        if self.ragged and self.lengths.is_cpu and may_read_values(self.lengths) and self.batch_size:
            self.longest = int(self.lengths.max())  # the longest sequence may be gone
        if self._pages is not None and self.block_table is not None:
            self._pages.reorder(index.tolist())
            self.block_table = self.block_table.index_select(0, index)
            return
        filled = slice(0, self.longest)
        for name in ("keys", "values", "key_scales", "value_scales"):
            buffer = getattr(self, name)
            if buffer is None:
                continue
            rows = buffer[:, :, filled].index_select(0, index)
            if rows.shape[0] != buffer.shape[0]:
                buffer = buffer.new_zeros(rows.shape[0], *buffer.shape[1:])
                setattr(self, name, buffer)
            buffer[:, :, filled] = rows

    def reset(self) -> None:
        """Removes all steps and keeps the allocation."""
        self.lengths = torch.zeros_like(self.lengths)
        self.longest, self.ragged = 0, False
        if self._pages is not None:
            self._pages.reset()

    def _append_to_pages(self, key: Tensor, value: Tensor, T: int, lengths: Tensor | None) -> None:
        pages, table = self._pages, self.block_table
        assert pages is not None and table is not None
        if tracing():
            raise NotImplementedError("KeyValueCache: page_size needs eager mode, got a traced call")
        counts = [T] * self.batch_size if lengths is None else lengths.tolist()
        longest = max((n + more for n, more in zip(pages.lengths, counts)), default=0)
        if longest > self.capacity:
            raise ValueError(
                f"KeyValueCache: steps must fit the capacity of {self.capacity}, got {T} after {self.longest} cached "
                "steps"
            )
        copies, added = pages.extend(counts)
        if added:
            b, n, page = torch.tensor(added, device=table.device).unbind(1)
            table[b, n] = page.to(torch.int32)
        tensors = [t for t in (self.keys, self.values, self.key_scales, self.value_scales) if t is not None]
        if copies:
            old, new = torch.tensor(copies, device=table.device).unbind(1)
            for buffer in tensors:
                buffer[new] = buffer[old]
        step = torch.arange(T, device=table.device)
        valid = step < torch.tensor(counts, device=table.device).unsqueeze(1)  # [B, T]
        b, t = valid.nonzero(as_tuple=True)
        at = self.lengths[b] + t
        page, row = table[b, at // pages.size].long(), at % pages.size
        for buffer, scales, given in (
            (self.keys, self.key_scales, key),
            (self.values, self.value_scales, value),
        ):
            rows, of_rows = _stored(given, buffer)
            buffer[page, :, row] = rows[b, :, t]
            if scales is not None and of_rows is not None:
                scales[page, :, row] = of_rows[b, :, t]
        self.lengths = self.lengths + (T if lengths is None else lengths)
        self.ragged = self.ragged or lengths is not None
        self.longest = longest


def _check_tensors(**given: Any) -> None:
    for name, t in given.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"KeyValueCache: {name} must be a tensor, got {describe(t)}")


class _Pages:
    """Assignment of pages to sequences. Sequences may share pages; a shared page is copied before a step is added."""

    def __init__(self, count: int, size: int, batch_size: int) -> None:
        self.count, self.size = count, size
        self.tables: list[list[int]] = [[] for _ in range(batch_size)]
        self.lengths = [0] * batch_size  # steps of each sequence
        self.reset()

    def reset(self) -> None:
        self.tables = [[] for _ in self.tables]
        self.lengths = [0] * len(self.lengths)
        self.users = [0] * self.count  # sequences that use a page
        self.free = list(range(self.count - 1, -1, -1))

    def extend(self, counts: Sequence[int]) -> tuple[list[tuple[int, int]], list[tuple[int, int, int]]]:
        """Assigns pages for counts[b] more steps of sequence b.

        Returns: the pages to copy, (from, to), and the changes of the table: (sequence, place, page).
        """
        copied = [self._copies(b, n) for b, n in enumerate(counts)]
        left: dict[int, int] = {}  # users of the pages that are copied
        needed = 0
        for b, n in enumerate(counts):
            if copied[b]:
                page = self.tables[b][-1]
                left[page] = left.get(page, self.users[page]) - 1
                copied[b] = left[page] > 0  # the last user keeps the page
            needed += copied[b] + -(-(self.lengths[b] + n) // self.size) - len(self.tables[b])
        if needed > len(self.free):
            raise ValueError(
                f"KeyValueCache: pages must suffice for all sequences, {needed} more are needed, got {len(self.free)} "
                f"free of {self.count}; increase pages, or reset or shorten the batch"
            )
        copies, added = [], []
        for b, n in enumerate(counts):
            table = self.tables[b]
            if copied[b]:
                old, page = table[-1], self._take()
                self.users[old] -= 1
                copies.append((old, page))
                table[-1] = page
                added.append((b, len(table) - 1, page))
            self.lengths[b] += n
            while len(table) * self.size < self.lengths[b]:
                table.append(self._take())
                added.append((b, len(table) - 1, table[-1]))
        return copies, added

    def _copies(self, b: int, n: int) -> bool:
        """Whether new steps of sequence b begin in a page that other sequences use."""
        return n > 0 and self.lengths[b] % self.size > 0 and self.users[self.tables[b][-1]] > 1

    def _take(self) -> int:
        page = self.free.pop()
        self.users[page] = 1
        return page

    def reorder(self, index: Sequence[int]) -> None:
        tables = [list(self.tables[b]) for b in index]
        lengths = [self.lengths[b] for b in index]
        for page in (page for table in tables for page in table):
            self.users[page] += 1
        for page in (page for table in self.tables for page in table):
            self.users[page] -= 1
            if self.users[page] == 0:
                self.free.append(page)
        self.tables, self.lengths = tables, lengths


def _converts(t: Tensor, cache: Tensor) -> bool:
    """Whether a tensor of another dtype than that of the cache can be stored in it, or attend to it."""
    floats = (torch.float32, torch.bfloat16, torch.float16)
    return t.device.type == "cpu" and t.dtype in floats and cache.dtype in (*floats, torch.int8)


def _stored(x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows in the dtype of the cache, and their scales."""
    if cache.dtype == torch.int8:
        return quantize_rows(x)
    return x.to(cache.dtype), None
