from collections.abc import Sequence
from typing import Any

namespace: str  # of the ops: torch.ops.seqkernels
schemas: str  # hash of the schemas of all ops

def build_info() -> dict[str, Any]: ...
def explain_recurrent(
    *, kind: str, T: int, B: int, N: int, D: int, H: int, P: int, directions: int, heads: int = 1, float64: bool
) -> dict[str, Any]: ...
def explain_recurrent_cuda(  # where CUDA kernels are built
    *,
    kind: str,
    dtype: str,
    T: int,
    B: int,
    D: int,
    H: int,
    P: int = 0,  # 0: no projection
    directions: int = 1,
    heads: int = 1,
    options: list[str] = ...,
    tf32: bool = False,
    major: int = 0,  # compute capability; 0: of the current device, as the rest of it
    minor: int = 0,
    multiprocessors: int = 0,
    shared_bytes: int = 0,
) -> dict[str, Any]: ...
def set_tf32(allow: bool) -> bool: ...
def set_cuda_tiers(names: Sequence[str]) -> list[str]: ...
def recurrent_kinds() -> list[dict[str, Any]]: ...
def recurrent_saved(kind: str, H: int, options: bool) -> int: ...
def set_isa(name: str) -> str: ...
def set_always_parallel(on: bool) -> bool: ...  # for tests of concurrency
def explain_embedding_bag(*, N: int, B: int, D: int, element_size: int) -> dict[str, Any]: ...  # isa, threads
def explain_attention(
    *, B: int, Hq: int, Hk: int, Tq: int, Tk: int, D: int, Dv: int
) -> dict[str, Any]: ...  # isa, threads, tasks, unit, block
