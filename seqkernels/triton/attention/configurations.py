"""Configurations of the attention kernels: block sizes, warps, pipeline stages and shared memory."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton


class Config(NamedTuple):
    """Block sizes of a program, warps and pipeline stages."""

    BM: int  # queries
    BN: int  # keys
    num_warps: int
    num_stages: int


FORWARD, ROWS, KEYS, TILES = "forward", "rows", "keys", "tiles"

# By kernel and bytes of an element, for head sizes up to 64, 128 and 256: blocks that do not spill registers.
CONFIGS: dict[tuple[str, int], tuple[Config, ...]] = {
    (FORWARD, 2): (Config(128, 64, 4, 3), Config(128, 128, 8, 3), Config(64, 64, 8, 2)),
    (ROWS, 2): (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(64, 32, 8, 2)),
    (KEYS, 2): (Config(64, 128, 8, 2), Config(32, 128, 8, 2), Config(32, 64, 8, 1)),
    (FORWARD, 4): (Config(64, 32, 8, 1), Config(16, 32, 8, 1)),
    (ROWS, 4): (Config(32, 16, 4, 1), Config(16, 16, 8, 1)),
    (KEYS, 4): (Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
    (FORWARD, 8): (Config(32, 16, 8, 1), Config(32, 16, 8, 1)),
    (ROWS, 8): (Config(32, 16, 8, 1), Config(16, 16, 4, 1)),
    (KEYS, 8): (Config(32, 32, 4, 1), Config(16, 32, 8, 1)),
}
# With a mask, dropout, a left window, ALiBi or a softcap, and for the attention weights: a block of scores more.
EXTRA: dict[tuple[str, int], tuple[Config, ...]] = {
    (FORWARD, 2): (Config(64, 64, 4, 2), Config(128, 64, 8, 2)),
    (ROWS, 2): (Config(128, 32, 8, 2), Config(128, 32, 8, 2), Config(32, 32, 8, 1)),
    (KEYS, 2): (Config(32, 64, 8, 2), Config(32, 64, 8, 1), Config(32, 32, 8, 1)),
}
# For less shared memory and matrix products from registers, as on sm_80.
SMALL: dict[tuple[str, int], tuple[Config, ...]] = {
    (FORWARD, 2): (Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 32, 8, 1)),
    (ROWS, 2): (Config(128, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 1)),
    (KEYS, 2): (Config(32, 64, 8, 1), Config(32, 64, 8, 2), Config(32, 32, 8, 1)),
}
WARPGROUPS = 200 << 10  # bytes of shared memory; sm_90 and later have more
LARGEST = {2: 256, 4: 128, 8: 128}  # largest head size that is not wide, by bytes of an element
# Columns that a program reads at a time, for wide heads and in the kernels that compute tiles of scores only.
CHUNK = {2: 64, 4: 64, 8: 32}
WIDE: dict[tuple[str, int], Config] = {
    (FORWARD, 2): Config(64, 64, 8, 1),
    (ROWS, 2): Config(32, 32, 8, 1),
    (KEYS, 2): Config(64, 32, 8, 1),
    (TILES, 2): Config(64, 64, 8, 1),
    (FORWARD, 4): Config(32, 32, 8, 1),
    (ROWS, 4): Config(32, 32, 8, 1),
    (KEYS, 4): Config(16, 32, 8, 1),
    (TILES, 4): Config(16, 32, 8, 1),
    **{(kernel, 8): Config(16, 16, 4, 1) for kernel in (FORWARD, ROWS, KEYS, TILES)},
}


def needed(kernel: str, dtype: torch.dtype, BD: int, BDV: int, c: Config, extra: bool = False) -> int:
    """Bytes of shared memory of a program: its own block, the pipelined blocks that it reads, and blocks of scores that
    change their layout. extra: see EXTRA."""
    kept, read = (c.BN, c.BM) if kernel == KEYS else (c.BM, c.BN)
    held = kept * (BD if kernel == FORWARD else BD + BDV) + read * BD * (kernel == KEYS)
    tiles = c.BM * c.BN * ((5 if dtype == torch.float64 else 3) * (kernel == KEYS) + extra)
    return (held + c.num_stages * read * (BD + BDV) + tiles) * dtype.itemsize


@functools.cache
def config(kernel: str, dtype: torch.dtype, D: int, Dv: int, extra: bool = False, shared: int = 227 << 10) -> Config:
    """The configuration of a kernel, reduced until it fits into shared bytes of shared memory."""
    if kernel == TILES or is_wide(dtype, D, Dv):
        return WIDE[kernel, dtype.itemsize]
    BD, BDV = padded(D), padded(Dv)
    size = 0 if max(D, Dv) <= 64 else 1 if max(D, Dv) <= 128 else 2
    for table in (SMALL,) if shared < WARPGROUPS else (EXTRA,) if extra else ():
        if size < len(table.get((kernel, dtype.itemsize), ())):
            break
    else:
        table = CONFIGS
    chosen = table[kernel, dtype.itemsize][size]
    while needed(kernel, dtype, BD, BDV, chosen, extra) > shared:
        BM, BN, warps, stages = chosen
        if stages > 1:
            chosen = Config(BM, BN, warps, stages - 1)
        elif max(BM, BN) > 16:
            chosen = Config(BM // 2, BN, warps, 1) if BM >= BN else Config(BM, BN // 2, warps, 1)
        else:
            break
    return chosen


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program can have."""
    if device.type != "cuda":
        return 227 << 10
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


def padded(D: int) -> int:
    """Columns of a block that holds D columns."""
    return max(triton.next_power_of_2(D), 16)


def is_wide(dtype: torch.dtype, D: int, Dv: int) -> bool:
    """Whether the kernels read the head in chunks of columns."""
    return max(D, Dv) > LARGEST[dtype.itemsize]


def columns(kernel: str, dtype: torch.dtype, D: int, Dv: int) -> dict[str, int]:
    """D and Dv, and the columns that a program reads at a time."""
    most = (CHUNK if kernel == TILES or is_wide(dtype, D, Dv) else LARGEST)[dtype.itemsize]
    return dict(D=D, DV=Dv, BD=min(padded(D), most), BDV=min(padded(Dv), most))
