"""Compile every CUDA kernel for every architecture, on any machine with nvcc, and check its resource usage.

Registers, spills, stack and static shared memory of each kernel are compared with resources.json in this folder. A
spill in a kernel that the file lists as hot (regular expressions over names) is always an error.

    python tests/cuda_on_cpu/check_gpu_build.py [--only embedding_bag] [--jobs 2] [--update]
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("resources.json")
# The flags of cmake/cuda.cmake.
FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler=-fPIC,-Wall", "-Xptxas=-v"]
ARCHITECTURES = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_100,code=[sm_100,compute_100]",
]
FIELDS = ("registers", "spilled", "stack", "shared")
Kernels = dict[str, dict[str, dict[str, int]]]  # by name, by architecture


def find_nvcc() -> str:
    candidates = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin", os.environ.get("PATH", "")]
    for path in reversed(candidates):
        if nvcc := shutil.which("nvcc", path=path):
            return nvcc
    raise SystemExit("check_gpu_build: nvcc is neither on PATH nor in CUDA_HOME")


def version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)", text)
    return found.group(1) if found else text.strip()


def demangle(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if not names or tool is None:
        return names
    output = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [short(name) for name in output.splitlines()]


def short(name: str) -> str:
    """Shorten void seqkernels::(anonymous namespace)::f<float>(Args) to f<float>."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "").replace("seqkernels::", "")
    if not name.endswith(")"):
        return name
    depth, at = 1, len(name) - 1
    while depth and at:
        at -= 1
        depth += (name[at] == ")") - (name[at] == "(")
    return name[:at]


def parse(output: str) -> tuple[Kernels, dict[str, str]]:
    """Parse the output of ptxas -v: resources by mangled name, and warnings."""
    kernels: Kernels = {}
    name = architecture = ""
    stack = spilled = 0
    for line in output.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            name, architecture = found.groups()
        elif found := re.search(r"Function properties for (\w+)", line):
            if found.group(1) != name:
                name = ""  # a function that is not inlined: the numbers of its caller include it
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, spilled = int(found.group(1)), int(found.group(2)) + int(found.group(3))
        elif (found := re.search(r"Used (\d+) registers", line)) and name:
            shared = re.search(r"(\d+) bytes smem", line)
            numbers = (int(found.group(1)), spilled, stack, int(shared.group(1)) if shared else 0)
            kernels.setdefault(name, {})[architecture] = dict(zip(FIELDS, numbers))
    warnings = {line: "" for line in output.splitlines() if "warning" in line.lower()}
    return kernels, warnings


def compile_one(nvcc: str, source: Path) -> tuple[Kernels, dict[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *FLAGS, *ARCHITECTURES, "-I", str(ROOT / "csrc"), "-c", str(source), "-o", f"{folder}/x.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"check_gpu_build: {source.relative_to(ROOT)} does not compile\n{done.stderr}{done.stdout}")
    return parse(done.stderr + done.stdout)


def compare(kernels: Kernels, known: Kernels, whole: bool) -> list[str]:
    """List the differences. Kernels that are only in the table are reported if everything was compiled."""
    lines = []
    for name in sorted(kernels.keys() | (known.keys() if whole else set())):
        for architecture in sorted(kernels.get(name, {}).keys() | known.get(name, {}).keys()):
            now, before = kernels.get(name, {}).get(architecture), known.get(name, {}).get(architecture)
            if now is None or before is None:
                lines.append(f"{name}, {architecture}: {'is new' if before is None else 'is gone'}")
            elif now != before:
                changed = [
                    f"{field} {before[field]} -> {now[field]}" for field in FIELDS if now[field] != before[field]
                ]
                lines.append(f"{name}, {architecture}: {', '.join(changed)}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only sources whose path contains this text")
    parser.add_argument("--jobs", type=int, default=1, help="number of concurrent compilers (default 1)")
    parser.add_argument("--update", action="store_true", help="write resources.json")
    options = parser.parse_args()

    nvcc = find_nvcc()
    everything = sorted(ROOT.glob("csrc/*/cuda/*.cu"))
    sources = [source for source in everything if options.only in str(source.relative_to(ROOT))]
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"nvcc": "", "hot": [], "kernels": {}}
    kernels: Kernels = {}
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for source, (found, warnings) in zip(sources, pool.map(lambda s: compile_one(nvcc, s), sources)):
            print(f"{source.relative_to(ROOT)}: {len(found)} kernels")
            for warning in warnings:
                print(f"  {warning}")
            for name, short_name in zip(found, demangle(list(found))):
                if short_name in kernels:
                    raise SystemExit(f"check_gpu_build: two kernels have the name {short_name}")
                kernels[short_name] = found[name]

    problems = []
    whole = sources == everything
    for pattern in table["hot"]:
        matching = [name for name in kernels if re.search(pattern, name)]
        if whole and not matching:
            problems.append(f"no kernel matches {pattern}, which resources.json lists as hot")
        for name in matching:
            for architecture, numbers in kernels[name].items():
                if numbers["spilled"]:
                    problems.append(f"{name}, {architecture}: a hot kernel, spills {numbers['spilled']} bytes")
    differences = compare(kernels, table["kernels"], whole)
    if options.update:
        kept = {} if whole else table["kernels"]
        table |= {"nvcc": version(nvcc), "kernels": dict(sorted((kept | kernels).items()))}
        rows = [f"    {json.dumps(name)}: {json.dumps(numbers)}" for name, numbers in table["kernels"].items()]
        head = json.dumps({key: table[key] for key in ("nvcc", "hot")}, indent=2)[:-2]
        TABLE.write_text(head + ',\n  "kernels": {\n' + ",\n".join(rows) + "\n  }\n}\n")
        print(f"{TABLE.relative_to(ROOT)}: {len(kernels)} kernels written, {len(differences)} numbers changed")
    elif version(nvcc) != table["nvcc"]:
        print(f"nvcc is {version(nvcc)}, the table was created by {table['nvcc'] or 'none'}: not compared")
    else:
        problems += differences

    header = f"{'kernel':70} {'architecture':12} " + " ".join(f"{field:>9}" for field in FIELDS)
    print("\n" + header)
    for name, by_architecture in sorted(kernels.items()):
        for architecture, numbers in by_architecture.items():
            if numbers["spilled"] or numbers["stack"] or any(re.search(pattern, name) for pattern in table["hot"]):
                print(f"{name[:70]:70} {architecture:12} " + " ".join(f"{numbers[field]:9}" for field in FIELDS))
    print("(hot kernels and kernels with a stack; resources.json lists all of them)")
    for problem in problems:
        print(f"PROBLEM {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
