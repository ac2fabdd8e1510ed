"""Mutation check of the synchronisation in the CUDA kernels: `make check-mutants`.

    python tests/cuda_on_cpu/mutants.py [--update] [--only TEXT]

Each wait, publication, barrier, fence and slot of the kernels with several blocks or warps is weakened in turn, and a
small test must then fail in one of the orders of threads of the emulation. The emulation weakens a call while it runs,
so nothing is compiled again: a mutant is a place in the sources (all calls there, inlined or instantiated, are weakened
together) and a weakening. `mutants.json` has the result for each mutant; one that no test kills needs a reason there,
why it changes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]
TABLE = ROOT / "tests" / "cuda_on_cpu" / "mutants.json"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

import cuda_on_cpu  # noqa: E402

# Weakenings of each operation; the order of both is that of Operation and Weakening in emulation.h.
WEAKENINGS = ["none", "removed", "one less", "relaxed", "other slot"]
OPERATIONS = {
    "wait": ["removed", "one less", "relaxed"],
    "publication": ["removed", "relaxed"],
    "block barrier": ["removed"],
    "warp barrier": ["removed"],
    "named barrier": ["removed"],
    "cluster barrier": ["removed"],
    "grid barrier": ["removed"],
    "fence": ["removed"],
    "arrival": ["removed"],
    "phase": ["removed", "one less"],
    "copies": ["removed", "one less"],
    "delivery": ["removed"],
    "slot": ["other slot"],
    "update": ["removed"],
}
ORDERS = [*cuda_on_cpu.LOCKSTEP, *cuda_on_cpu.SCHEDULES]


# ---- the tests


def scenarios() -> dict[str, Callable[[], None]]:
    """Small tests that together run all kernels with several warps, each under the current order of threads."""
    from embedding_bag import test_cuda as bags
    from recurrent import test_cuda as layers

    from seqkernels.functional import _embedding_bag_ops
    from support.cases import BagCase, assert_bag_near, bag_definition, bag_lengths, make_bag_inputs

    half, single = torch.float16, torch.float32
    found: dict[str, Callable[[], None]] = {}

    def layer(name: str, *tiers: str, multiprocessors: int = 8, tf32: bool = False, **of: object) -> None:
        of = dict(B=3, T=5, D=4, H=40, form="lengths", dtype=half) | of
        tolerance = 4e-3 if tf32 else None

        def run() -> None:
            with layers.machine(multiprocessors=multiprocessors), layers.tiers(*tiers), layers.tf32(tf32):
                layers.check_layer(layers.Layer(**of), tolerance=tolerance)

        found[name] = run

    every = ("reset", "zoneout_masks", "dropout", "variational", "clip")
    for kind in ("lstm", "gru", "gru_before"):
        layer(f"cluster {kind}", "cluster", kind=kind, bidirectional=kind == "lstm")
        layer(f"grid {kind}", "grid", kind=kind, B=18, multiprocessors=2)
        layer(f"grid {kind}, one tile", "grid", kind=kind, B=5, multiprocessors=6)
        layer(f"grid {kind}, TF32", "grid", kind=kind, dtype=single, tf32=True, form="packed")
        layer(f"steps {kind}", "steps", kind=kind, dtype=single, form="dense", T=3)
        layer(f"cell {kind}", "cell", kind=kind, dtype=single, form="dense", T=1, B=5)
    layer("cluster lstm with options", "cluster", options=every)
    layer("grid gru_before with options", "grid", kind="gru_before", options=every)
    layer("cluster lstm, three groups", "cluster", B=2, T=3, H=520, multiprocessors=132)
    layer("steps lstm, several tiles", "steps", dtype=torch.bfloat16, B=70, T=2, D=70, H=70)
    layer("grid lstm, weights in shared memory", "grid", B=2, T=3, H=264, multiprocessors=9, dtype=single, tf32=True)
    layer("steps lstm, TF32", "steps", dtype=single, tf32=True, B=17, T=2, D=70, H=33)

    def bag(name: str, mode: str, sparse: bool = False, **of: object) -> None:
        case = BagCase(**(dict(E=40, D=20, lengths=(300, 2, 0, *bag_lengths(30, 20), 2200), rows="few") | of), why=name)

        def run() -> None:
            inputs = make_bag_inputs(case, single, mode)
            before = _embedding_bag_ops.ops
            _embedding_bag_ops.ops = bags.emulated_ops()
            try:
                assert_bag_near(bags.run(inputs, sparse=sparse), bag_definition(inputs), inputs)
            finally:
                _embedding_bag_ops.ops = before

        found[name] = run

    for mode in ("mean", "max"):
        bag(f"bags {mode}", mode, weights="same")
        bag(f"bags {mode}, sparse", mode, sparse=True)
    bag("bags sum, short", "sum", E=5000, lengths=bag_lengths(200, 3))
    return found


def passes(scenario: Callable[[], None], library: ctypes.CDLL, order: dict[str, int]) -> bool:
    torch.manual_seed(0)
    with cuda_on_cpu.settings(library, **order):
        try:
            scenario()
        except (RuntimeError, AssertionError):
            return False
    return True


# ---- places


@dataclasses.dataclass(frozen=True, order=True)
class Place:
    """A call in the sources: `path` has the lines from the kernel to the call, as grid.cuh:378 > grid.cuh:167."""

    operation: str
    path: tuple[tuple[str, int], ...]

    def text(self) -> str:
        """The path without line numbers: file and source text of each line, which later changes elsewhere leave."""
        return " > ".join(f"{file}: {source(file, line)}" for file, line in self.path)


def source(file: str, line: int) -> str:
    return (ROOT / file).read_text().splitlines()[line - 1].strip()


@contextlib.contextmanager
def weakened(library: ctypes.CDLL, addresses: list[int], weakening: str) -> Iterator[None]:
    array = (ctypes.c_int64 * len(addresses))(*addresses)
    library.seqkernels_emulation_weaken(array, len(addresses), WEAKENINGS.index(weakening))
    try:
        yield
    finally:
        library.seqkernels_emulation_weaken(None, 0, 0)


def recorded(library: ctypes.CDLL, scenario: Callable[[], None]) -> dict[int, str]:
    """The operation at each address that a scenario reaches."""
    library.seqkernels_emulation_record_sites()
    passed = passes(scenario, library, {})
    count = 10_000
    addresses, operations = (ctypes.c_int64 * count)(), (ctypes.c_int64 * count)()
    found = library.seqkernels_emulation_sites(addresses, operations, ctypes.c_int64(count))
    assert passed, "a test fails without a mutant"
    assert found <= count
    return {addresses[i]: list(OPERATIONS)[operations[i]] for i in range(found)}


def places_of(module: pathlib.Path, operations: dict[int, str]) -> dict[Place, list[int]]:
    """The addresses of each place, by addr2line."""
    addresses = sorted(operations)
    answer = subprocess.run(
        ["addr2line", "-a", "-i", "-e", str(module), *(hex(a - 1) for a in addresses)],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    found: dict[Place, list[int]] = {}
    for address, block in zip(addresses, answer.split("\n0x"), strict=True):
        frames = []
        for location in block.splitlines()[1:]:
            file, _, line = location.partition(" (")[0].rpartition(":")
            at = file.rfind("/csrc/")
            if at >= 0 and not file.endswith("common/device.cuh"):
                frames.append((file[at + 1 :], int(line)))
        if frames:  # innermost first
            found.setdefault(Place(operations[address], tuple(reversed(frames))), []).append(address)
    return found


# ---- the check


def check(only: str) -> dict[str, dict[str, str]]:
    """What kills each mutant: {place: {weakening: scenario and order, or ""}}."""
    from recurrent import test_cuda as layers

    layers.module()
    (module,) = sorted(cuda_on_cpu.FOLDER.glob("_emulated*.so"))
    library = cuda_on_cpu.load("_emulated")
    tests = scenarios()
    times, reached, operations = {}, {}, {}
    for name, scenario in tests.items():
        start = time.perf_counter()
        reached[name] = recorded(library, scenario)
        times[name] = time.perf_counter() - start
        operations |= reached[name]
        for order in ORDERS:
            assert passes(scenario, library, order), f"{name} fails without a mutant: {order}"
        print(f"{name}: {len(reached[name])} calls, {times[name]:.2f} s", flush=True)
    # Calls in code that several paths inline are one place: the last two lines of a path.
    places: dict[tuple[str, str], list[int]] = {}
    for place, addresses in places_of(module, operations).items():
        short = dataclasses.replace(place, path=place.path[-2:])
        places.setdefault((place.operation, short.text()), []).extend(addresses)
    result: dict[str, dict[str, str]] = {}
    for (operation, text), addresses in sorted(places.items()):
        if only not in text:
            continue
        for weakening in OPERATIONS[operation]:
            killed = ""
            of_place = [n for n in sorted(tests, key=lambda n: times[n]) if set(addresses) & set(reached[n])]
            for order in ORDERS:
                for name in of_place:
                    with weakened(library, addresses, weakening):
                        if not passes(tests[name], library, order):
                            killed = f"{name}, {order}"
                            break
                if killed:
                    break
            result.setdefault(text, {})[f"{operation} {weakening}"] = killed
            print(f"{'killed  ' if killed else 'SURVIVES'} {operation} {weakening}: {text}  {killed}", flush=True)
    return result


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--update", action="store_true", help="write the table, keeping its reasons")
    arguments.add_argument("--only", default="", help="places whose text has this")
    options = arguments.parse_args()
    torch.use_deterministic_algorithms(True)  # new memory is NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    result = check(options.only)
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    survivors = []
    for place, mutants in result.items():
        for mutant, killed in mutants.items():
            known = table.get(place, {}).get(mutant, "")
            if not killed and known.startswith("equivalent: "):
                mutants[mutant] = known
            elif not killed:
                survivors.append(f"{mutant}: {place}")
    if options.update:
        TABLE.write_text(json.dumps((table if options.only else {}) | result, indent=1, sort_keys=True) + "\n")
    total = sum(map(len, result.values()))
    print(f"{total} mutants, {len(survivors)} survive without a reason in {TABLE.name}")
    if survivors:
        sys.exit("\n".join(survivors))


if __name__ == "__main__":
    main()
