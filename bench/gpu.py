"""Build, tests and benchmarks on a machine with a GPU and nvcc, in parts with time limits: `make gpu`, or

    python bench/gpu.py [--only build,tests] [--minutes 9] [--resume] [--select "bench=lstm and not packed"] [--out DIR]

build        builds _C for this GPU and this processor in build/gpu
tests        runs the tests marked `cuda`, in several processes if pytest-xdist is installed
memcheck     runs compute-sanitizer on the tests marked `cuda` and `sanitize`
racecheck    the same with its race detection
tune         compares the tiers of recurrent layers: bench/tune.py
bench        runs the rows marked `cuda`, the least measured first
cpu          runs bench/scaling.py: the CPU kernels with 1 to 16 threads

Each part has a share of the time and passes unused time on to the next. A part that exceeds its time is interrupted,
then killed with all its processes; its results so far are kept. --resume continues the runs of this day with the same
sources: parts that are complete do not run, and the others skip the tests, layers and rows that have results. This
Python must have torch with CUDA, cmake, ninja, pytest, pytest-benchmark and hypothesis; nothing is installed.

Results in bench/results, or in --out: <device>-<date>.json, which bench/report.py prints, <device>-<date>-tuning.json,
and <device>-<date>-checks.json with the status of each part, to which later runs add their parts. The output of the
parts is in build/gpu, or in --out.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import datetime
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import report
import tally

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"  # the tree in which the parts run: the built module and copies of all other files
RESULTS = ROOT / "bench" / "results"
# Shares of the time. On 16 processors, the build takes 90 s, mostly for the CPU kernels.
SHARES = {"build": 125, "tests": 115, "memcheck": 40, "racecheck": 40, "tune": 40, "bench": 120, "cpu": 50}
RESERVE = 10.0  # seconds reserved for writing results
GRACE = 5.0  # seconds between an interrupt and a kill
TEST_S = 60.0  # time limit of a test or row, ten times that if it is marked slow, because Triton compiles in some
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # required for deterministic algorithms of torch
STOP = threading.Event()  # set by a termination signal


def require(condition: object, what: str) -> None:
    if not condition:
        raise SystemExit(f"gpu: {what}")


def deadlines(parts: Sequence[str], start: float, seconds: float) -> dict[str, float]:
    """Deadline of each part, if the parts share `seconds` from `start` on."""
    each, whole, ends = 0.0, sum(SHARES[part] for part in parts), {}
    for part in parts:
        each += SHARES[part]
        ends[part] = start + seconds * each / whole
    return ends


# ---- processes ----


class Ended(NamedTuple):
    status: str  # passed, failed or cut
    output: str
    code: int


def run(command: Sequence[object], until: float, log: Path, **environment: str) -> Ended:
    """Run a command until the deadline of the monotonic clock. Shows its output immediately and appends it to `log`."""
    print("$", *command, flush=True)
    paths = [str(SITE), str(SITE / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {"PATH": tools(), "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=SITE if SITE.exists() else ROOT,
        env={**os.environ, **ours, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # signals also reach its children
    )
    assert process.stdout is not None
    output: list[str] = []
    reader = threading.Thread(target=show, args=(process.stdout, log, output), daemon=True)
    reader.start()
    cut = not ends_by(process, until)
    if cut:
        send(process, signal.SIGINT)
        ends_by(process, time.monotonic() + GRACE, stoppable=False)
    send(process, signal.SIGKILL)  # also terminates remaining children
    code = process.wait()
    reader.join(timeout=2.0)
    return Ended("cut" if cut else "passed" if code == 0 else "failed", "".join(output), code)


def show(pipe: IO[bytes], log: Path, output: list[str]) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with pipe, open(log, "a", encoding="utf-8") as file:
        while data := os.read(pipe.fileno(), 1 << 16):
            text = decoder.decode(data)
            output.append(text)
            for stream in (sys.stdout, file):
                stream.write(text)
                stream.flush()


def ends_by(process: subprocess.Popen[bytes], until: float, *, stoppable: bool = True) -> bool:
    while process.poll() is None:
        if time.monotonic() >= until or (stoppable and STOP.is_set()):
            return False
        time.sleep(0.05)
    return True


def send(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def tools() -> str:
    """PATH extended by the scripts of this Python and the default location of the CUDA toolkit."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/cuda/bin"])


# ---- parts ----


@dataclass
class Part:
    """Arguments of a part: its deadline, a pytest -k expression or "", and the location of its files."""

    name: str
    until: float
    select: str
    out: Path
    logs: Path
    stem: str  # <device>-<date>
    earlier: dict[str, Any] | None = None  # with --resume, the result of the run that this one continues

    @property
    def log(self) -> Path:
        return self.logs / f"{self.name}.log"

    def run(self, command: Sequence[object], **environment: str) -> Ended:
        return run(command, self.until, self.log, **environment)

    @property
    def selection(self) -> list[str]:
        return ["-k", self.select] if self.select else []


def stage() -> None:
    """Copies the current tree to the folder of the built module."""
    for name in ("seqkernels", "tests", "bench", "csrc"):
        ignored = shutil.ignore_patterns("_C.*so", "__pycache__", "results", "_emulated*", "_selftest*")
        shutil.copytree(ROOT / name, SITE / name, ignore=ignored, dirs_exist_ok=True)
    shutil.copy2(ROOT / "pyproject.toml", SITE)


def build(part: Part) -> dict[str, Any]:
    """Builds for this device and this processor only, because other instruction sets take most of the time."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}{minor}" + ("a" if major == 9 else "")
    shutil.rmtree(SITE, ignore_errors=True)
    stage()
    steps: list[list[object]] = [
        [
            *("cmake", "-G", "Ninja", "-S", ROOT, "-B", BUILD / "cmake", f"-DPython_EXECUTABLE={sys.executable}"),
            *("-DSEQKERNELS_CUDA=ON", f"-DSEQKERNELS_CUDA_ARCHITECTURES={architecture}"),
            f"-DSEQKERNELS_INSTRUCTION_SETS={instruction_sets()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={SITE / 'seqkernels'}",
        ],
        ["cmake", "--build", BUILD / "cmake", "--target", "_C"],
        [sys.executable, "-c", "import seqkernels; print(seqkernels.build_info())"],
    ]
    for step in steps:
        ended = part.run(step)
        if ended.status != "passed":
            return {"status": ended.status, "architecture": architecture, "output": ended.output[-2000:]}
    return {"status": "passed", "architecture": architecture}


def instruction_sets() -> str:
    """The portable set, and the widest one of this processor."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text(encoding="utf-8").split()) if cpuinfo.exists() else set()
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags:
        return "portable;avx512" + (";avx512_vnni" if "avx512_vnni" in flags else "")
    if {"avx2", "fma", "f16c"} <= flags:
        return "portable;avx2" + (";avx2_vnni" if "avx_vnni" in flags else "")
    return "portable"


def sources() -> str:
    """Digest of the files that are built and run."""
    digest = hashlib.sha256()
    for folder in ("csrc", "cmake", "seqkernels", "tests", "bench"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".h", ".cuh", ".cu", ".cpp", ".py", ".cmake"):
                digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def keep_finished(record: Path) -> None:
    """Removes tests that failed or did not end from the record of a part, so that they run again."""
    finished = {test: o for test, o in tally.read(record).outcomes.items() if o in ("passed", "skipped")}
    lines = [json.dumps({"test": test, "outcome": outcome, "message": ""}) + "\n" for test, outcome in finished.items()]
    record.write_text("".join(lines), encoding="utf-8")


def pytest_part(part: Part, command: Sequence[object], **environment: str) -> tuple[dict[str, Any], str]:
    """Results and output of pytest. If a test crashes the process, pytest restarts with the remaining tests."""
    record, before = part.logs / f"{part.name}.jsonl", part.logs / f"{part.name}-before.jsonl"
    before.unlink(missing_ok=True)
    if part.earlier is None or not record.exists():
        record.unlink(missing_ok=True)
    else:
        keep_finished(record)
        shutil.copy2(record, before)
    environment |= {
        "SEQKERNELS_TALLY": str(record),
        "SEQKERNELS_TALLY_BEFORE": str(before),
        "SEQKERNELS_TALLY_SECONDS": str(TEST_S),
    }
    command = [*command, "-q", "-p", "no:cacheprovider", "-p", "tally", *part.selection]
    known, output = -1, ""
    while True:
        ended = part.run(command, **environment)
        output += ended.output
        found = tally.read(record)
        if ended.status != "failed" or 0 <= ended.code <= 5 or len(found.outcomes) == known:
            break  # pytest ended normally, or a restart has made no progress
        known = len(found.outcomes)
        shutil.copy2(record, before)
    counts = found.counts()
    wrong = counts["failed"] + counts["unfinished"] or ended.code not in (0, 5)
    status = "cut" if ended.status == "cut" else "failed" if wrong else "passed" if found.outcomes else "nothing to run"
    result: dict[str, Any] = {"status": status, **counts}
    if found.messages or found.unfinished():
        result |= {"failures": dict(list(found.messages.items())[:20]), "unfinished tests": found.unfinished()[:20]}
    elif status == "failed":
        result["output"] = output[-4000:]
    return result, output


def workers() -> list[str]:
    """Arguments of pytest for several processes that share the device; none if pytest-xdist is not installed."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(min(8, len(os.sched_getaffinity(0))))]


def run_tests(part: Part) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "tests", "-m", "cuda", "--continue-on-collection-errors", *workers()]
    return pytest_part(part, command, **DETERMINISTIC)[0]


def sanitizer_reports(text: str) -> dict[str, Any]:
    """Summaries of compute-sanitizer, one per process, and its first reports."""
    lines = [line.removeprefix("=========").strip() for line in text.splitlines() if line.startswith("=========")]
    summaries = [line for line in lines if "SUMMARY" in line]
    reports = [line for line in lines if line not in summaries and not line.startswith("COMPUTE-SANITIZER")]
    return {"summaries": summaries, "reports": reports[:60]}


def found_errors(summaries: Sequence[str]) -> bool:
    return any(int(count) for line in summaries for count in re.findall(r"(\d+) (?:error|hazard)", line))


def sanitizer(part: Part) -> dict[str, Any]:
    program = shutil.which("compute-sanitizer", path=tools())
    if program is None:
        return {"status": "no compute-sanitizer"}
    # Only files with such tests, because collecting all files takes as long as running them. The files of operators run
    # first, the recurrent layers before the others.
    tests = SITE / "tests"
    every = sorted(tests.rglob("test_*.py"), key=lambda file: (file.parent != tests, file), reverse=True)
    files = [file.relative_to(SITE) for file in every if "sanitize" in file.read_text(encoding="utf-8")]
    wrapper = [program, f"--tool={part.name}", "--error-exitcode=86", "--target-processes=all"]
    command = [*wrapper, sys.executable, "-m", "pytest", *files, "-m", "cuda and sanitize"]
    # The caching allocator of torch would hide accesses out of bounds.
    found, output = pytest_part(part, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1", **DETERMINISTIC)
    reports = sanitizer_reports(output)
    if found["status"] != "cut" and found_errors(reports["summaries"]):
        found["status"] = "failed"
    return found | {"sanitizer": reports}


def file_of(part: Part, stem: str) -> Path:
    """The file of the run that this one continues, otherwise a new one."""
    name = (part.earlier or {}).get("file")
    return part.out / name if name else report.unused(part.out, stem)


def tune(part: Part) -> dict[str, Any]:
    file = file_of(part, f"{part.stem}-tuning")
    command = [sys.executable, SITE / "bench" / "tune.py", "--device", "cuda", "--save", file, *part.selection]
    ended = part.run([*command, *(["--resume"] if part.earlier is not None else [])])
    return {"status": ended.status, **rows_of(file)} | (
        {"output": ended.output[-4000:]} if ended.status == "failed" else {}
    )


def bench(part: Part) -> dict[str, Any]:
    return rows(part, part.stem, "bench", "--device", "cuda")


def cpu(part: Part) -> dict[str, Any]:
    return rows(part, f"{part.stem}-cpu", "bench/scaling.py")


def rows(part: Part, stem: str, *arguments: str) -> dict[str, Any]:
    file = file_of(part, stem)
    command = [sys.executable, "-m", "pytest", *arguments, "--benchmark-only", "--budget", "0.3"]
    found, _ = pytest_part(part, [*command, f"--save-results={file}"])
    return found | rows_of(file)


def rows_of(file: Path) -> dict[str, Any]:
    return (
        {"file": file.name, "rows": len(json.loads(file.read_text(encoding="utf-8"))["rows"])} if file.exists() else {}
    )


PARTS = {
    "build": build,
    "tests": run_tests,
    "memcheck": sanitizer,
    "racecheck": sanitizer,
    "tune": tune,
    "bench": bench,
    "cpu": cpu,
}


# ---- all parts ----


def selections(given: Sequence[str]) -> dict[str, str]:
    found = dict(each.partition("=")[::2] for each in given)
    require(
        all(part in PARTS and expression for part, expression in found.items()),
        f"--select takes part=expression, where part is one of {', '.join(PARTS)}; got {', '.join(given)}",
    )
    return found


def is_complete(found: dict[str, Any], select: str, digest: str) -> bool:
    done = found.get("status") in ("passed", "nothing to run", "no compute-sanitizer")
    return done and found.get("sources") == digest and found.get("select") == select


def summary(checks: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, found in checks.items():
        keys = ("tests", "passed", "failed", "skipped", "unfinished", "rows")
        numbers = [f"{found[key]} {key}" for key in keys if key in found]
        numbers += found.get("sanitizer", {}).get("summaries", [])
        lines.append(f"{name:10} {found['status']:15} {found['seconds']:7.1f} s  {', '.join(numbers)}".rstrip())
        lines += [f"{'':10}   {test}" for test in [*found.get("failures", ()), *found.get("unfinished tests", ())]]
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    missing = [n for n in ("torch", "pytest", "pytest_benchmark") if importlib.util.find_spec(n) is None]
    require(not missing, f"{sys.executable} must have the packages {', '.join(missing)}")
    import torch

    require(torch.cuda.is_available(), f"torch {torch.__version__} finds no CUDA device")
    for program in ("nvcc", "cmake", "ninja"):
        require(shutil.which(program, path=tools()), f"{program} is not on PATH")
    return {
        "device": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit in minutes (default 9)")
    parser.add_argument(
        "--select", action="append", default=[], metavar="PART=EXPRESSION", help="expression for pytest -k of a part"
    )
    parser.add_argument("--out", type=Path, help="folder for results and output")
    parser.add_argument("--resume", action="store_true", help="run what has no results of this day and these sources")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",")
    require(set(wanted) <= set(PARTS), f"--only takes {', '.join(PARTS)}; got {options.only}")
    parts, selected = [part for part in PARTS if part in wanted], selections(options.select)
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda *_: STOP.set())

    about = machine()
    stem = re.sub("[^a-z0-9]+", "-", about["device"].lower()).strip("-") + "-" + about["date"]
    out, logs = (options.out or RESULTS).resolve(), (options.out or BUILD).resolve()
    for folder in (out, logs):
        folder.mkdir(parents=True, exist_ok=True)
    path = out / f"{stem}-checks.json"
    known: dict[str, Any] = (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}) | about
    checks = known.setdefault("parts", {})
    digest = sources()
    if options.resume:
        complete = [part for part in parts if is_complete(checks.get(part, {}), selected.get(part, ""), digest)]
        if not SITE.exists() and "build" in complete:
            complete.remove("build")
        print(f"gpu: complete: {', '.join(complete) or 'none'}", flush=True)
        parts = [part for part in parts if part not in complete]
    require("build" in parts or SITE.exists(), f"there is no build in {BUILD}; --only must name build")
    if "build" not in parts:
        stage()
    ends = deadlines(parts, start, 60 * options.minutes - RESERVE)
    for name in parts:
        if STOP.is_set():
            break
        begun = time.monotonic()
        known_part = checks.get(name, {})
        of_sources = known_part.get("sources") == digest and known_part.get("select") == selected.get(name, "")
        earlier = known_part if options.resume and of_sources else None
        part = Part(name, ends[name], selected.get(name, ""), out, logs, stem, earlier)
        if earlier is None:
            part.log.unlink(missing_ok=True)
        print(f"\n== {name}: {part.until - begun:.0f} of {ends[parts[-1]] - begun:.0f} seconds left", flush=True)
        found = PARTS[name](part)
        of_run = {"sources": digest, "select": part.select, "seconds": round(time.monotonic() - begun, 1)}
        checks[name] = {**found, **of_run}
        report.write(path, json.dumps(known, indent=1) + "\n")
        if name == "build" and found["status"] != "passed":
            break

    for name in ("bench", "cpu"):
        file = checks.get(name, {}).get("file", "") if name in parts else ""
        if file and (out / file).exists():
            print("\n" + report.text(report.from_json((out / file).read_text(encoding="utf-8"))))
    print(f"\n{about['device']}, {path}\n{summary(checks)}", flush=True)
    return int(any(checks[part]["status"] in ("failed", "cut") for part in parts if part in checks))


if __name__ == "__main__":
    sys.exit(main())
