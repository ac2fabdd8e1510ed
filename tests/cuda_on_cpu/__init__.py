"""CUDA kernels on a CPU: the emulation's modules, built by `make test`, and their settings."""

from __future__ import annotations

import contextlib
import ctypes
import pathlib
from collections.abc import Iterator

import numpy as np

FOLDER = pathlib.Path(__file__).parent

# Orders of threads in which each test of a multi-block kernel passes (emulation.h explains the settings): parties in
# lockstep, then parties far ahead of others or far behind, and old values of flags.
LOCKSTEP = [dict(races=1, unwritten=1), dict(backward=1), dict(seed=3)]
SCHEDULES = [
    dict(schedule=1),
    dict(schedule=1, backward=1, party=1),
    dict(schedule=2, seed=1),
    dict(schedule=2, seed=2, party=1),
    dict(schedule=3, seed=1),
    dict(schedule=3, seed=2, party=1),
    dict(stale=1),
    dict(schedule=1, stale=1),
]
DEVICE_SETTINGS = {"major", "minor", "multiprocessors", "shared_bytes", "l2_bytes", "cluster_blocks"}


def load(name: str) -> ctypes.CDLL:
    """Load a module of this folder, `_selftest` or `_emulated`. Each has its own emulation state."""
    found = sorted(FOLDER.glob(f"{name}*.so"))
    if not found:
        raise FileNotFoundError(f"tests/cuda_on_cpu/{name}*.so is not built: make test builds it")
    library = ctypes.CDLL(str(found[0]))
    library.seqkernels_emulation_set.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    library.seqkernels_emulation_set.restype = ctypes.c_int64
    library.seqkernels_emulation_get.argtypes = [ctypes.c_char_p]
    library.seqkernels_emulation_get.restype = ctypes.c_int64
    return library


@contextlib.contextmanager
def settings(library: ctypes.CDLL, **values: int) -> Iterator[None]:
    """Change settings within the context: races=1, unwritten=1, seed=3, multiprocessors=4, ...; see emulation.h."""
    previous = {}
    try:
        for name, value in values.items():
            previous[name] = library.seqkernels_emulation_set(name.encode(), value)
            assert previous[name] != -1, f"no setting {name}"
        yield
    finally:
        for name, value in previous.items():
            library.seqkernels_emulation_set(name.encode(), value)


def counted(library: ctypes.CDLL, name: str) -> int:
    """Return a counter: launches, threads or switches so far."""
    return library.seqkernels_emulation_get(name.encode())


class SelfTest:
    """The kernels of selftest_cuda.cu."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.seqkernels_selftest.restype = ctypes.c_char_p

    def __call__(self, name: str, *arrays: np.ndarray, variant: int = 0) -> None:
        """Run a kernel on arrays, which it modifies. Raises RuntimeError with the reported failure."""
        for array in arrays:
            assert array.flags.c_contiguous
        data = (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
        sizes = (ctypes.c_int64 * len(arrays))(*(array.nbytes for array in arrays))
        answer = self.library.seqkernels_selftest(name.encode(), variant, len(arrays), data, sizes).decode()
        if answer:
            raise RuntimeError(answer)
