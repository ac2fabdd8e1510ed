"""Runs a function in processes of a torch.distributed group."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WORKERS, DEADLINE_S = 2, 120


def _worker(rank: int, work: Callable, folder: str) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=DEADLINE_S / 2)
    where = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=WORKERS, timeout=limit)
    # The models of `work` are gone before the group is: the destructor of DistributedDataParallel's reducer, where it
    # holds the last reference to the group, can wait for a thread that waits for the GIL (torch 2.13).
    torch.save(work(rank, folder), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def run_workers(work: Callable[[int, str], object], folder: Path) -> list[Any]:
    """work(rank, folder) of each process of a group of WORKERS, on CPUs."""
    workers = torch.multiprocessing.spawn(_worker, (work, str(folder)), nprocs=WORKERS, join=False)
    deadline = time.monotonic() + DEADLINE_S
    try:
        while not workers.join(timeout=1):
            assert time.monotonic() < deadline, "the workers did not end in time"
    finally:
        for process in workers.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORKERS)]
