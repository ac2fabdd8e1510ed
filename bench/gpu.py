"""Everything that a machine with a GPU and nvcc can say, in parts that end in time: `make gpu`, or

    python bench/gpu.py [--only build,tests] [--minutes 9]

build        _C for this GPU, and the emulation, out of the tree in build/gpu
tests        those marked `cuda`
memcheck     compute-sanitizer over the same tests, but for the slow ones
racecheck    likewise
bench        the rows marked `cuda`

This Python must have torch with CUDA, cmake, ninja, pybind11, pytest, pytest-benchmark and hypothesis; nothing is
installed. The bench goes to bench/results/<device>-<date>.json, which bench/report.py prints; how the parts ended goes
to <device>-<date>-checks.json after each, so a run that is cut leaves what it has, and a later one adds its parts.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"  # what the parts run: the built module with copies of everything else
RESULTS = ROOT / "bench" / "results"
PARTS = ("build", "tests", "memcheck", "racecheck", "bench")
RESERVE = 10.0  # seconds left for writing down what was found


class Clock:
    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        return self.end - time.monotonic() - RESERVE


def require(condition: object, what: str) -> None:
    if not condition:
        raise SystemExit(f"gpu: {what}")


def run(command: list[Any], clock: Clock, **environment: str) -> tuple[str, str]:
    """(passed, failed or cut; output), the output shown as it comes."""
    print("$", *command, flush=True)
    env = {**os.environ, "PYTHONPATH": str(SITE), **environment}
    cwd = SITE if SITE.exists() else ROOT
    process = subprocess.Popen(
        list(map(str, command)), cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    said, end = [], time.monotonic() + max(clock.left(), 1)
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.2)
        if text := process.stdout.read():
            said.append(text)
            print(text, end="", flush=True)
    cut = process.poll() is None
    if cut:
        process.kill()
        process.wait()
    if text := process.stdout.read():
        said.append(text)
        print(text, end="", flush=True)
    status = "cut" if cut else "passed" if process.returncode == 0 else "failed"
    return status, "".join(said)


def tools() -> str:
    """PATH with this Python's scripts, and the usual place of the toolkit, on it."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/cuda/bin"])


def build(clock: Clock) -> dict[str, Any]:
    import torch

    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}{minor}" + ("a" if major == 9 else "")
    shutil.rmtree(SITE, ignore_errors=True)
    module = SITE / "seqkernels"
    configure = [
        *("cmake", "-G", "Ninja", "-S", ROOT, "-B", BUILD / "cmake", f"-DPython_EXECUTABLE={sys.executable}"),
        *("-DSEQKERNELS_CUDA=ON", f"-DSEQKERNELS_CUDA_ARCHITECTURES={architecture}"),
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module}",
    ]
    status, said = run(configure, clock, PATH=tools())
    for target in ("_C", "cuda_on_cpu"):
        if status == "passed":
            status, said = run(["cmake", "--build", BUILD / "cmake", "--target", target], clock, PATH=tools())
    for name in ("seqkernels", "tests", "bench", "csrc"):
        ignored = shutil.ignore_patterns("_C.*", "__pycache__", "results")
        shutil.copytree(ROOT / name, SITE / name, ignore=ignored, dirs_exist_ok=True)
    shutil.copy2(ROOT / "pyproject.toml", SITE)
    return {"status": status, "architecture": architecture, "said": said[-2000:] if status != "passed" else ""}


def run_tests(clock: Clock, expression: str, wrapper: Sequence[str] = ()) -> dict[str, Any]:
    record = SITE / "tests.xml"
    record.unlink(missing_ok=True)
    command = [*wrapper, sys.executable, "-m", "pytest", "tests", "-q", "-x" if wrapper else "--maxfail=20"]
    status, said = run(
        [*command, "-m", expression, "-p", "no:cacheprovider", f"--junitxml={record}"], clock, PATH=tools()
    )
    found: dict[str, Any] = {"status": status}
    if record.exists():
        suite = next(iter(ET.parse(record).getroot().iter("testsuite")))
        found |= {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    if status == "failed" and "no tests ran" in said:
        found["status"] = "nothing to run"
    elif status != "passed":
        found["said"] = said[-4000:]
    return found


def sanitizer(tool: str, clock: Clock) -> dict[str, Any]:
    program = shutil.which("compute-sanitizer", path=tools())
    if program is None:
        return {"status": "no compute-sanitizer"}
    # torch's allocator would hide what lies outside a tensor.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    try:
        wrapper = [program, f"--tool={tool}", "--error-exitcode=86", "--target-processes=all"]
        found = run_tests(clock, "cuda and not slow", wrapper)
    finally:
        del os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"]
    return found


def bench(clock: Clock) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench",
        "--device",
        "cuda",
        "-p",
        "no:cacheprovider",
        "--benchmark-only",
    ]
    status, said = run([*command, "-q", "--budget", "0.5", "--save-results"], clock, PATH=tools())
    saved = sorted((SITE / "bench" / "results").glob("*.json"), key=lambda path: path.stat().st_mtime)
    found: dict[str, Any] = {"status": status}
    if saved:
        found["run"] = json.loads(saved[-1].read_text())
    elif "no tests ran" in said or "deselected" in said:
        found["status"] = "nothing to run"
    else:
        found["said"] = said[-4000:]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them")
    parser.add_argument("--minutes", type=float, default=9.0, help="end within so many (default 9)")
    options = parser.parse_args()
    parts = options.only.split(",")
    require(set(parts) <= set(PARTS), f"--only takes {', '.join(PARTS)}; got {options.only}")
    clock = Clock(options.minutes)

    missing = [n for n in ("torch", "pybind11", "pytest", "pytest_benchmark") if importlib.util.find_spec(n) is None]
    require(not missing, f"{sys.executable} lacks {', '.join(missing)}")
    import torch

    require(torch.cuda.is_available(), f"torch {torch.__version__} sees no CUDA device")
    for program in ("nvcc", "cmake", "ninja"):
        require(shutil.which(program, path=tools()), f"{program} is not on PATH")

    name = torch.cuda.get_device_name()
    date = datetime.date.today().isoformat()
    stem = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") + "-" + date
    path = RESULTS / f"{stem}-checks.json"
    RESULTS.mkdir(exist_ok=True)
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    known |= {
        "device": name,
        "date": date,
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
    }
    checks = known.setdefault("parts", {})
    # Parts in their order; each of those still to come gets its share if one before takes too long.
    share = {"build": 0.45, "tests": 0.6, "memcheck": 0.4, "racecheck": 0.5, "bench": 1.0}
    for part in (p for p in PARTS if p in parts):
        allowed = Clock((clock.left() * (share[part] if part != parts[-1] else 1.0) + RESERVE) / 60)
        print(f"\n== {part}: {max(allowed.left(), 0):.0f} of {max(clock.left(), 0):.0f} seconds left", flush=True)
        start = time.monotonic()
        if part == "build":
            found = build(allowed)
        elif part == "tests":
            found = run_tests(allowed, "cuda")
        elif part == "bench":
            found = bench(allowed)
        else:
            found = sanitizer(part, allowed)
        if rows := found.pop("run", None):
            (RESULTS / f"{stem}.json").write_text(json.dumps({**rows, "device": name}, indent=1) + "\n")
        checks[part] = {**found, "seconds": round(time.monotonic() - start, 1)}
        path.write_text(json.dumps(known, indent=1) + "\n")
        if part == "build" and found["status"] != "passed":
            break

    print(f"\n{name}, {path.relative_to(ROOT)}")
    for part, found in checks.items():
        numbers = ", ".join(f"{found[key]} {key}" for key in ("tests", "failures", "errors", "skipped") if key in found)
        print(f"{part:10} {found['status']:15} {found['seconds']:7.1f} s  {numbers}")
    return int(any(checks[part]["status"] in ("failed", "cut") for part in parts if part in checks))


if __name__ == "__main__":
    sys.exit(main())
