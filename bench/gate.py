"""Instruction counts of hot calls, which noise does not change, against a committed table: `make bench-gate`.

    python bench/gate.py [--update] [--only TEXT]

valgrind's callgrind counts the instructions within the extension module alone, so that the counts depend on its source,
its compiler and the instruction set, but not on Python, on torch, on other processes or on the processor. The calls run
in one process with one thread and AVX2, which valgrind supports.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "bench" / "gate.json"
MODULE = "_C.abi3.so"
LIMIT = 0.03  # relative change of a count
ISA = "avx2"
WARM = 3  # calls before the count
SAME = ("compiler", "isa")  # counts are comparable where these are equal

MARKERS = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void zero(void) { CALLGRIND_ZERO_STATS; }
void dump(const char* name) { CALLGRIND_DUMP_STATS_AT(name); }
"""


# ---- the calls, in the process under valgrind


def calls() -> Iterator[tuple[str, int, Callable[[], object]]]:
    """Name, number of counted calls, and the call."""
    import torch
    from torch.nn.utils.rnn import pack_padded_sequence

    import seqkernels
    from seqkernels import functional, inference, nn

    torch.manual_seed(0)

    def training(forward: Callable[[], torch.Tensor], *wanted: torch.Tensor) -> Callable[[], object]:
        upstream = torch.randn(forward().shape)
        return lambda: torch.autograd.grad(forward(), wanted, upstream)

    def without_autograd(forward: Callable[[], Any]) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return forward()

        return call

    lstm, gru, one, x = nn.LSTM(64, 64), nn.GRU(64, 64), torch.randn(1, 1, 64), torch.randn(32, 8, 64)
    packed = pack_padded_sequence(x, torch.arange(32, 0, -4))
    yield "LSTM, T=1 B=1 H=64, inference", 20, without_autograd(lambda: lstm(one)[0])
    yield "LSTM, T=32 B=8 H=64, inference", 3, without_autograd(lambda: lstm(x)[0])
    yield "LSTM, T=32 B=8 H=64, training", 2, training(lambda: lstm(x)[0], *lstm.parameters())
    yield "GRU, packed, T=32 B=8 H=64, training", 2, training(lambda: gru(packed)[0].data, *gru.parameters())
    prepared, _ = inference.prepare(torch.nn.LSTM(64, 64).eval(), "int8")
    yield "prepared LSTM, int8, T=8 B=1 H=64", 10, without_autograd(lambda: prepared(x[:8, :1].contiguous())[0])

    for mode in ("sum", "max"):
        bag = nn.EmbeddingBag(500, 64, mode=mode)
        indices, offsets = torch.randint(500, (640,)), torch.arange(0, 640, 20)
        yield (
            f"EmbeddingBag, {mode}, D=64 B=32 L=20, inference",
            10,
            without_autograd(lambda bag=bag, i=indices, o=offsets: bag(i, o)),
        )
        yield (
            f"EmbeddingBag, {mode}, D=64 B=32 L=20, training",
            10,
            training(lambda bag=bag, i=indices, o=offsets: bag(i, o), bag.weight),
        )

    q, k, v = (torch.randn(1, 2, 64, 32).requires_grad_() for _ in range(3))
    attend = functional.scaled_dot_product_attention
    yield "attention, H=2 L=64 D=32, inference", 5, without_autograd(lambda: attend(q, k, v))
    yield "attention, causal, H=2 L=64 D=32, training", 3, training(lambda: attend(q, k, v, is_causal=True), q, k, v)
    query, keys, scores = torch.randn(2, 10, 64), torch.randn(2, 20, 64), torch.randn(64)
    pairs = [t.requires_grad_() for t in (query, keys, torch.randn(2, 20, 64), scores)]
    yield (
        "additive attention, B=2 Tq=10 Tk=20 H=64, training",
        3,
        training(lambda: functional.additive_attention(*pairs), *pairs),
    )

    crf, emissions = nn.CRF(10), torch.randn(20, 8, 10).requires_grad_()
    tags = torch.randint(10, (20, 8))
    yield "CRF, T=20 B=8 K=10, training", 3, training(lambda: crf(emissions, tags), emissions, *crf.parameters())
    yield "CRF, T=20 B=8 K=10, best path", 3, without_autograd(lambda: crf.decode(emissions))
    log_probs = torch.randn(50, 4, 20).log_softmax(2).requires_grad_()
    targets, steps, labels = torch.randint(1, 20, (4, 10)), torch.full((4,), 50), torch.full((4,), 10)
    yield (
        "CTC, T=50 B=4 V=20 L=10, training",
        3,
        training(lambda: functional.ctc_loss(log_probs, targets, steps, labels), log_probs),
    )
    print(json.dumps(seqkernels.build_info()), flush=True)


def run_calls(library: str, only: str) -> None:
    """The process under valgrind: one dump of counts per call."""
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    markers = ctypes.CDLL(library)
    started = False
    gc.disable()
    for name, number, call in calls():
        if only not in name:
            continue
        for _ in range(WARM):
            call()
        if not started:
            markers.start()  # instrumentation only from here, since it slows down the imports
            call()
            started = True
        markers.zero()
        for _ in range(number):
            call()
        markers.dump(json.dumps([name, number]).encode())


# ---- counting


class Unusable(Exception):
    """The counts cannot be taken or compared; the message says what to do."""


def count_in(dump: str, module: str = MODULE) -> int:
    """Instructions within an object, of the text of a file of callgrind without compression of names."""
    total, inside, inclusive = 0, False, False
    for line in dump.splitlines():
        if line.startswith("ob="):
            inside = line.endswith(module)
        elif line.startswith("calls="):
            inclusive = True  # the next line counts the callee too
        elif line[:1] in tuple("0123456789+-*"):
            _, *costs = line.split()  # a cost of zero is left out
            if inside and not inclusive and costs:
                total += int(costs[0])
            inclusive = False
    return total


def name_of(dump: str) -> tuple[str, int] | None:
    """The name and number of calls of a dump; None for others than those of run_calls."""
    mark = "desc: Trigger: Client Request: "
    for line in dump.splitlines():
        if line.startswith(mark) and line.endswith("]"):
            name, number = json.loads(line.removeprefix(mark))
            return name, number
    return None


def counts(only: str = "") -> tuple[dict[str, int], dict[str, str]]:
    """Instructions of one call by name, and the build that ran."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise Unusable("valgrind is not installed; install it, for example with: apt-get install valgrind")
    fixed = {"SEQKERNELS_ISA": ISA, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder, "markers.so"))
        source = Path(folder, "markers.c")
        source.write_text(MARKERS, encoding="utf-8")
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or "cc"
        compiled = subprocess.run(
            [compiler, "-shared", "-fPIC", "-O1", "-o", library, str(source)],
            capture_output=True,
            text=True,
            check=False,
        )
        if compiled.returncode:
            raise Unusable(f"the headers of valgrind do not compile with {compiler}:\n{compiled.stderr.strip()}")
        command = [
            *without_randomisation(), valgrind, "--tool=callgrind", "--instr-atstart=no", "--compress-strings=no",
            "--compress-pos=no", f"--callgrind-out-file={folder}/counts", "-q",
            sys.executable, __file__, "--calls-of", library, "--only", only,
        ]  # fmt: skip
        done = subprocess.run(command, env=os.environ | fixed, capture_output=True, text=True, check=False, cwd=folder)
        if done.returncode:
            raise Unusable(f"the calls failed under valgrind:\n{(done.stderr or done.stdout).strip()[-3000:]}")
        build = json.loads(done.stdout.strip().splitlines()[-1])
        version = subprocess.run([valgrind, "--version"], capture_output=True, text=True, check=True)
        build["valgrind"] = version.stdout.strip().removeprefix("valgrind-")
        found: dict[str, int] = {}
        for path in sorted(Path(folder).glob("counts.*"), key=lambda p: int(p.suffix[1:])):
            text = path.read_text(encoding="utf-8")
            named = name_of(text)
            if named is not None:
                found[named[0]] = round(count_in(text) / named[1])
    if not all(found.values()):
        raise Unusable(f"callgrind counted no instruction within {MODULE}: {found}")
    return found, build


def without_randomisation() -> list[str]:
    """A command prefix that switches off address randomisation, where that is allowed."""
    prefix = ["setarch", os.uname().machine, "-R"]
    try:
        allowed = subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return []
    return prefix if allowed else []


# ---- comparison


@dataclass(frozen=True)
class Change:
    name: str
    expected: int | None  # None: not in the table
    got: int | None  # None: not counted

    @property
    def relative(self) -> float:
        """Rounded, so that a change of exactly the limit passes."""
        return round(self.got / self.expected - 1, 9) if self.expected and self.got is not None else 0.0

    @property
    def verdict(self) -> str:
        if self.expected is None:
            return "not in the table: --update adds it"
        if self.got is None:
            return "in the table, but no such call: --update removes it"
        if self.relative > LIMIT:
            return f"FAILS: more than {LIMIT:.0%} above the table"
        return "less than the table: --update records it" if self.relative < -LIMIT else ""

    @property
    def fails(self) -> bool:
        return self.expected is None or self.got is None or self.relative > LIMIT

    def __str__(self) -> str:
        expected, got = (f"{n:,}" if n is not None else "-" for n in (self.expected, self.got))
        return f"{self.name:<52} {expected:>14} {got:>14} {self.relative:>+8.2%}  {self.verdict}".rstrip()


def compare(
    table: Mapping[str, Any], found: Mapping[str, int], build: Mapping[str, str], only: str = ""
) -> list[Change]:
    """The changes of all calls; raises Unusable if the builds differ."""
    different = [
        f"{key} {table['build'][key]} in the table, {build[key]} here"
        for key in SAME
        if table["build"][key] != build[key]
    ]
    if different:
        raise Unusable(
            f"the counts of another build are not comparable: {'; '.join(different)}. Build with the compiler of the "
            "table, or run `make bench-gate ARGS=--update` at the commit to compare with, then `make bench-gate` here"
        )
    names = dict.fromkeys([*(name for name in table["counts"] if only in name), *found])
    return [Change(name, table["counts"].get(name), found.get(name)) for name in names]


def read(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(table["counts"], dict) and all(key in table["build"] for key in SAME)
    except FileNotFoundError:
        raise Unusable(f"{path} does not exist; write it with `make bench-gate ARGS=--update`") from None
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise Unusable(
            f"{path} is not a table of counts ({error!r}); write it with `make bench-gate ARGS=--update`"
        ) from None
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the table instead of comparing")
    parser.add_argument("--only", default="", metavar="TEXT", help="only calls whose name contains TEXT")
    parser.add_argument("--calls-of", metavar="LIBRARY", help=argparse.SUPPRESS)  # the process under valgrind
    arguments = parser.parse_args(argv)
    if arguments.calls_of:
        run_calls(arguments.calls_of, arguments.only)
        return 0
    try:
        table = None if arguments.update else read(TABLE)
        found, build = counts(arguments.only)
        if not found:
            raise Unusable(f"no call has {arguments.only!r} in its name")
        if table is None:
            known = read(TABLE)["counts"] if arguments.only and TABLE.exists() else {}
            date = datetime.datetime.now(tz=datetime.timezone.utc).strftime("%Y-%m-%d")
            kept = {key: build[key] for key in ("version", "torch", "compiler", "isa", "valgrind")}
            TABLE.write_text(json.dumps({"date": date, "build": kept, "counts": known | found}, indent=1) + "\n")
            print(f"written: {TABLE}, {len(found)} calls")
            return 0
        changes = compare(table, found, build, arguments.only)
    except Unusable as error:
        print(f"bench-gate: {error}", file=sys.stderr)
        return 2
    print(f"{'instructions of one call within ' + MODULE:<52} {'table':>14} {'here':>14} {'change':>8}")
    print("\n".join(map(str, changes)))
    failed = [change for change in changes if change.fails]
    others = [
        f"{key} {table['build'].get(key)}" for key in ("torch", "valgrind") if table["build"].get(key) != build[key]
    ]
    if failed and others:
        print(f"the table was made with {', '.join(others)}, whose headers or instructions may count differently")
    print(f"{len(failed)} of {len(changes)} calls fail" if failed else f"{len(changes)} calls within {LIMIT:.0%}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
