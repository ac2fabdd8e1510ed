"""Compiles all configurations of the Triton kernels to machine code, without a GPU, and fails if one spills.

python bench/check_triton.py [--jobs N] [--only TEXT] [--archs 80 90 100] [--write FILE]

Prints the maxima of each kernel, type and architecture; --write saves a row for each configuration.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ARCHS = (80, 90, 100)
SHARED = {
    80: 163 << 10,
    90: 227 << 10,
    100: 227 << 10,
}  # maximum bytes per block, from NVIDIA's programming guide
POINTER = {torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
SHORT = {torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass
class Job:
    """A kernel and the arguments that determine its compilation: constexprs, and None for absent pointers."""

    module: str
    kernel: str
    dtype: torch.dtype
    constexprs: dict[str, Any]
    arch: int
    num_warps: int
    maxnreg: int | None = None
    types: dict[str, str] = field(default_factory=dict)  # types of parameters that are not pointers to dtype
    shared: int | None = None  # shared memory that the launcher expects, in bytes
    num_stages: int = 1
    even: tuple[str, ...] = ()  # further sizes that are multiples of 16
    may_spill: bool = False

    def __str__(self) -> str:
        chosen = (f"{k}={v}" for k, v in self.constexprs.items() if v is not None)
        without = ",".join(k.removeprefix("p_") for k, v in self.constexprs.items() if v is None)
        without = f" without {without}" * bool(without)
        return f"{self.kernel} {SHORT[self.dtype]} sm_{self.arch} {' '.join(chosen)} warps={self.num_warps}{without}"


@dataclass
class Usage:
    registers: int = 0
    stack: int = 0  # bytes per thread, used by spilled registers
    shared: int = 0
    error: str = ""


# ---- parameters of kernels


@functools.cache
def groups() -> dict[str, Any]:
    """Named tuples of kernel arguments, by parameter name."""
    from seqkernels.triton.attention import tiles
    from seqkernels.triton.crf import chain
    from seqkernels.triton.embedding_bag import backward, bags
    from seqkernels.triton.recurrent import step

    layer = importlib.import_module("seqkernels.triton.recurrent.layer")  # the package has a function of that name

    return dict(
        s_q=tiles.Strides,
        s_k=tiles.Strides,
        s_v=tiles.Strides,
        s_o=tiles.Strides,
        s_m=tiles.MaskStrides,
        scores=chain.Scores,
        steps=chain.Steps,
        table=bags.Table,
        bags=bags.Bags,
        positions=backward.Positions,
        occurrences=backward.Occurrences,
        inputs=layer.Inputs,
        outputs=layer.Outputs,
        gradients=layer.Gradients,
        sequences=step.Sequences,
        masks=step.Masks,
        rows=step.Rows,
        initial=step.Initial,
        upstream=step.Upstream,
        written=step.Written,
    )


def parameters(kernel: Any) -> list[str]:
    """Names of parameters and of the fields of groups; these also with the name of the group, as in s_q.d."""
    found = []
    for name in kernel.arg_names:
        fields = getattr(groups().get(name), "_fields", ())
        found += [name, *fields, *(f"{name}.{field}" for field in fields)]
    return found


# ---- configurations


BAG_TYPES = dict(p_indices="*i64", p_offsets="*i64", p_arg="*i32", p_fault="*i64", p_row="*i64", p_bag="*i64")
BAG_TYPES |= dict(p_place="*i32", p_position="*i64", p_end="*i64", p_output="*i64", E="i64", N="i64", s_row="i64")


def bag_jobs(arch: int) -> Iterator[Job]:
    from seqkernels.triton.embedding_bag import launch

    for dtype, mode, everything in itertools.product(launch.DTYPES, range(4), (True, False)):
        extreme, float64 = mode in (launch.MAX, launch.MIN), dtype == torch.float64
        flags: dict[str, Any] = dict(HAS_PADDING=everything, HAS_LAST_OFFSET=not everything)
        by_weight = everything and mode == launch.MEAN
        how = dict(MODE=mode, BY_WEIGHT=by_weight, FLOAT64=float64, s_column=1)
        absent = dict(p_arg=None) if not extreme else {}
        if not everything:
            absent["p_weights"] = None
        for chosen in launch.configs(float64, extreme):
            tile = {k: v for k, v in chosen._asdict().items() if k in ("BB", "BR", "BD")}
            constexprs = {**flags, **tile, **absent, **how}
            yield Job(
                "embedding_bag.forward",
                "embedding_bag_forward_kernel",
                dtype,
                constexprs,
                arch,
                chosen.num_warps,
                chosen.maxnreg,
                BAG_TYPES,
            )
        compute = "*fp64" if float64 else "*fp32"
        types = dict(BAG_TYPES, p_divisor=compute)
        if mode != launch.MEAN:
            absent["p_divisor"] = None
        module = "embedding_bag.backward"
        if dtype == torch.float32 or (float64 and mode == launch.MEAN):
            constexprs = {**flags, **absent, "BY_WEIGHT": by_weight, "BR": launch.BLOCK}
            yield Job(module, "positions_kernel", dtype, constexprs, arch, 1, launch.MOST_REGISTERS, types)
        for BD in (16, launch.WIDEST):
            constexprs = {**absent, "BY_FREQUENCY": everything, "FLOAT64": float64, "BK": launch.ROWS, "BD": BD}
            if everything:
                constexprs["p_output"] = None
            yield Job(module, "table_gradient_kernel", dtype, constexprs, arch, 1, launch.MOST_REGISTERS, types)
            if everything:
                constexprs = {**flags, **absent, **how, "BR": launch.ROWS, "BD": BD}
                yield Job(module, "weights_gradient_kernel", dtype, constexprs, arch, 1, launch.MOST_REGISTERS, types)


TYPES = dict(p_lengths="*i64", p_starts="*i64", p_reset="*u8", p_zoneout_h="*u8", p_zoneout_c="*u8", p_candidate="*u8")
RECURRENT = ("layer_forward", "layer_backward", "step_forward", "step_backward")  # files with kernels


def recurrent_kernel(name: str) -> tuple[str, Any]:
    """The module of a kernel of recurrent layers, and the kernel."""
    for file in RECURRENT:
        module = importlib.import_module(f"seqkernels.triton.recurrent.{file}")
        if hasattr(module, name):
            return f"recurrent.{file}", getattr(module, name)
    raise ValueError(f"no kernel {name}")


def layer_jobs(arch: int) -> Iterator[Job]:
    """Kernels that run all steps of a recurrent layer."""
    from seqkernels.triton.recurrent import launch

    for dtype, kind in itertools.product((torch.float32, torch.float16, torch.bfloat16), launch.GATES):
        for H, way, everything in itertools.product((16, 32, 64, 128), ("forward", "backward"), (True, False)):
            chosen = launch.config(kind, dtype, H, SHARED[arch])
            if chosen is None:
                continue
            family = kind.partition("_")[0]
            constexprs: dict[str, Any] = dict(BB=chosen.BB, BH=chosen.BH, PRECISION=launch.PRECISION)
            if family == "rnn":
                constexprs["RELU"] = kind == "rnn_relu"
            unused: tuple[str, ...] = () if family in ("gru", "mgu") else ("p_bias", "p_dh_of_n")
            unused += () if family == "lstm" else ("p_c0", "p_cells", "p_c_n", "p_dc_n", "p_dc0")
            unused += ("p_saved",) if family == "rnn" else ()
            unused += ("p_h_n", "p_c_n") if way == "backward" else ()
            absent = unused if everything else (*unused, "p_lengths", "p_starts", "p_reset", "p_h0", "p_c0")
            module, kernel = recurrent_kernel(f"{family}_{way}_kernel")
            constexprs.update((name, None) for name in absent if name in parameters(kernel))
            yield Job(
                module,
                f"{family}_{way}_kernel",
                dtype,
                constexprs,
                arch,
                chosen.num_warps,
                chosen.maxnreg,
                dict(TYPES, p_x="*fp32", N="i64"),
                launch.needed(kind, dtype, chosen.BH),
            )


STEPS = (
    *(f"{cell}_step_{way}_kernel" for cell in ("lstm", "gru", "mgu", "rnn") for way in ("forward", "backward")),
    *(f"reset_before_{part}_kernel" for part in ("gates", "forward", "backward", "gates_backward")),
)
COMPUTED = ("p_x", "p_product", "p_direct", "p_dc", "p_dpeephole", "p_dreset_h", "p_dgate", "p_numbers", "p_gate_clip")


def step_jobs(arch: int) -> Iterator[Job]:
    """Kernels that run one step of a recurrent layer."""
    from seqkernels.triton.recurrent import launch, step

    for name, dtype, everything, variant in itertools.product(STEPS, launch.DTYPES, (True, False), (True, False)):
        module, kernel = recurrent_kernel(name)
        names = parameters(kernel)
        constexprs: dict[str, Any] = dict(BU=launch.BU)
        flag = next((flag for flag in ("COUPLED", "RELU", "MINIMAL") if flag in names), None)
        if flag is not None:
            constexprs[flag] = variant
        elif variant:
            continue
        unused: tuple[str, ...] = (
            () if name.startswith("lstm") else ("p_c0", "p_cells", "p_dcells", "p_dc", "p_dpeephole")
        )
        unused += () if name.startswith("lstm") else ("p_peephole", "p_zoneout_c")
        unused += () if name.startswith(("gru", "mgu")) else ("p_dh_of_n",)
        unused += ("p_candidate",) if name.startswith("rnn") else ()
        unused += ("p_dgate",) if flag == "MINIMAL" and not variant else ()
        if not everything:
            unused += (
                *step.Masks._fields,
                "p_gate_clip",
                "p_variational",
                "p_dpeephole",
                "p_lengths",
                "p_reset",
                "p_dcells",
            )
        constexprs.update((name, None) for name in unused if name in names)
        compute = "*fp64" if dtype == torch.float64 else "*fp32"
        types = dict(TYPES, **dict.fromkeys(COMPUTED, compute))
        types.update({n: "i64" for n in names if n.startswith("row")})
        yield Job(module, name, dtype, constexprs, arch, 1, launch.MOST_REGISTERS, types)


# Options of attention: pointers and constexprs.
ATTENTION = {
    "dense": ((), {}),
    "causal": ((), dict(RIGHT=True)),
    "lengths": (("p_q_lengths", "p_k_lengths"), {}),
    "packed": (("p_cu_q", "p_cu_k"), dict(RIGHT=True, GROUPED=True)),
    "mask": (("p_mask", "p_rest"), {}),
    "mask gradient": (("p_mask", "p_rest", "p_ds"), {}),
    "dropout": (("p_seed",), {}),
    "window": ((), dict(RIGHT=True, LEFT=True)),
    "softcap, alibi": (("p_slopes",), dict(RIGHT=True, CAP=True)),
    "weights": (("p_dw",), dict(RIGHT=True)),
}
ATTENTION_TYPES = dict(p_q_lengths="*i64", p_k_lengths="*i64", p_cu_q="*i32", p_cu_k="*i32", p_seed="*i64")
ATTENTION_TYPES |= dict(p_slopes="*fp32", scale="i64", cap="i64", rescale="i64")
KERNELS = dict(  # file and name
    forward=("forward", "attention_forward_kernel"),
    rows=("backward", "attention_backward_rows_kernel"),
    keys=("backward", "attention_backward_keys_kernel"),
    tiles=("weights", "attention_mask_gradient_kernel"),
    normaliser=("backward", "attention_normaliser_kernel"),
    weights=("weights", "attention_weights_kernel"),
)
OF_KERNEL = dict(
    forward=ATTENTION.keys() - {"mask gradient", "weights"},
    rows=ATTENTION.keys(),
    keys=ATTENTION.keys() - {"mask gradient"},
    tiles={"mask gradient"},
    normaliser={"mask"},
    weights={"weights", "mask", "dropout"},
)


def attention_jobs(arch: int) -> Iterator[Job]:
    from seqkernels.triton.attention import configurations

    plain = ("dense", "causal")
    every = [
        *((torch.bfloat16, D, name) for D in (64, 128) for name in ATTENTION),
        *((torch.float16, D, name) for D in (64, 128) for name in plain),
        *((torch.bfloat16, 256, name) for name in (*plain, "mask", "mask gradient")),
        *((torch.float32, D, name) for D in (64, 128) for name in ("causal", "mask gradient")),
        *((torch.float64, D, name) for D in (64, 128) for name in ("causal", "mask gradient")),
        *((torch.bfloat16, 640, name) for name in ("dense", "packed", "mask gradient", "dropout", "window", "weights")),
        *((torch.float32, 640, name) for name in ("causal", "mask gradient")),
        (torch.float64, 320, "causal"),
    ]
    for kernel, (dtype, D, name) in itertools.product(KERNELS, every):
        given, flags = ATTENTION[name]
        if name not in OF_KERNEL[kernel]:
            continue
        extra = name not in ("dense", "causal", "lengths", "packed")
        extra |= (kernel, name) == ("keys", "packed")
        program = kernel if kernel in ("forward", "rows", "keys") else "tiles"
        chosen = configurations.config(program, dtype, D, D, extra, SHARED[arch])
        columns = configurations.columns(program, dtype, D, D)
        # Wide heads, and all heads on sm_100, are checked against the limit of shared memory alone.
        BD, fixed = columns["BD"], arch < 100 and columns["BD"] >= D
        constexprs: dict[str, Any] = dict(LEFT=False, RIGHT=False, CAP=False, GROUPED=False) | flags
        constexprs |= dict(PRECISION="ieee", BM=chosen.BM, BN=chosen.BN, **columns)
        constexprs |= dict(SHARED_Q=False, SHARED_K=False, **dict.fromkeys(("s_q.d", "s_k.d", "s_v.d", "s_o.d"), 1))
        file, function = KERNELS[kernel]
        names = parameters(getattr(importlib.import_module(f"seqkernels.triton.attention.{file}"), function))
        optional = ("p_mask", "p_slopes", "p_q_lengths", "p_k_lengths", "p_cu_q", "p_cu_k", "p_seed", "p_dlse")
        absent = {*optional, "p_rest", "p_dw", "p_ds"} - {*given}
        if name == "weights":
            absent |= {"p_v", "p_dout", "p_out", "p_delta", "p_dv"}
            absent -= {"p_dlse"}
        constexprs |= dict.fromkeys(sorted(absent))
        constexprs = {key: value for key, value in constexprs.items() if key in names}
        compute = "*fp64" if dtype == torch.float64 else "*fp32"
        types = ATTENTION_TYPES | dict.fromkeys(("p_lse", "p_base", "p_rest", "p_dlse", "p_delta", "p_dmask"), compute)
        yield Job(
            f"attention.{file}",
            function,
            dtype,
            constexprs,
            arch,
            chosen.num_warps,
            None,
            types,
            configurations.needed(program, dtype, BD, BD, chosen, extra) if fixed else None,
            chosen.num_stages,
            tuple(n for n in names if n.startswith("s_")),
            # On sm_100, float64 products of Triton keep both operands in registers, and dense wide heads spill 16
            # bytes; with other tiles, packed ones spill.
            (arch, kernel, dtype.itemsize) in ((100, "forward", 8), (100, "rows", 8))
            or (arch, kernel, D, name) == (100, "forward", 640, "dense"),
        )


ADDITIVE = "additive_attention"


def additive_attention_jobs(arch: int) -> Iterator[Job]:
    from seqkernels.triton.additive_attention import launch

    for dtype, rows, everything in itertools.product(launch.DTYPES, (1, 8), (True, False)):
        wide = "*fp64" if dtype == torch.float64 else "*fp32"
        types = dict(p_mask="*u8", p_lengths="*i64", **dict.fromkeys(("p_weights", "p_scores", "p_g", "p_w"), wide))
        types |= dict.fromkeys(("p_dweights", "p_dv"), wide)
        absent = {} if everything else dict.fromkeys(("p_mask", "p_lengths"))
        pairs = launch.pair_tile(rows, dtype == torch.float64)
        pair = dict(BM=pairs.BM, BN=pairs.BN, BH=pairs.columns)
        products = launch.SKIPPING if everything else launch.PRODUCT
        product = dict(BM=products.BM, BN=products.BN, BD=products.columns)
        upstream = dict(BM=launch.PRODUCT.BM, BN=launch.PRODUCT.BN, BD=launch.PRODUCT.columns)
        row = dict(BN=launch.ROWS_OF_SOFTMAX)
        of_rows = {"p_dv": None} if everything else {}
        one = {"s_row": 1} if everything else {"s_other": 1}
        for file, kernel, constexprs in (
            ("forward", "scores", pair),
            ("forward", "softmax", row),
            ("forward", "product", dict(OF_ROWS=False, SKIP=everything, s_w_t=1) | product),
            ("forward", "product", dict(OF_ROWS=True, SKIP=False, s_w_r=1) | upstream),
            ("backward", "weight_gradient", upstream),
            ("backward", "softmax_gradient", row),
            ("backward", "rows_gradient", dict(OF_ROWS=everything) | of_rows | one | pair),
        ):
            module = importlib.import_module(f"seqkernels.triton.{ADDITIVE}.{file}")
            name = f"{ADDITIVE}_{kernel}_kernel"
            names = parameters(getattr(module, name))
            absent_here = {key: None for key in absent if key in names}
            yield Job(f"{ADDITIVE}.{file}", name, dtype, constexprs | absent_here, arch, launch.WARPS, types=types)


CRF = {  # kernels -> files
    "crf_forward_kernel": "forward",
    "crf_backward_kernel": "backward",
    "crf_pairs_kernel": "backward",
    "crf_viterbi_kernel": "viterbi",
    "crf_several_kernel": "viterbi",
}
CRF_TYPES = dict(p_counts="*i64", p_steps="*i64", p_before="*i64", p_tags="*i64", p_back="*i32", p_last="*i32")
CRF_TYPES |= dict.fromkeys(("p_log_z", "p_score", "p_dlog_z", "p_dscore", "p_dstart", "p_dend", "p_scores"), "*fp64")
CRF_COMPUTED = ("p_alpha", "p_gamma", "p_marginals", "p_rows", "p_lists")


def crf_jobs(arch: int) -> Iterator[Job]:
    """Each padded K up to 512, with all options, and one without."""
    from seqkernels.triton.crf import launch

    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    tags = (9, 32, 64, 128, 256, 512)
    for name, dtype, K, by_step, everything in itertools.product(CRF, dtypes, tags, (False, True), (True, False)):
        if not everything and K != 32:
            continue
        float64 = dtype == torch.float64
        walk = launch.config(K, float64, several=name == "crf_several_kernel")._asdict()
        if name == "crf_pairs_kernel":
            constexprs: dict[str, Any] = launch.pairs_config(K, float64, by_step)
            constexprs |= dict(BY_SEQUENCE=by_step, BY_STEP=by_step)
            out = {} if by_step else {"p_out": "*fp64"}
        else:
            constexprs = dict(walk, RESIDENT=not by_step and walk["BJ"] == walk["BK"], BS=launch.SCORES)
            constexprs["BN"] = launch.PATHS
            out = {}
        num_warps, maxnreg, num_stages = (constexprs.pop(n) for n in ("num_warps", "maxnreg", "num_stages"))
        names = parameters(getattr(importlib.import_module(f"seqkernels.triton.crf.{CRF[name]}"), name))
        if not everything:
            constexprs |= dict.fromkeys(("p_steps", "p_before", "p_start", "p_end"))
            if name not in ("crf_viterbi_kernel", "crf_several_kernel"):  # p_tags is their output
                constexprs["p_tags"] = None
            if by_step:
                constexprs["p_counts"] = None
        constexprs = {key: value for key, value in constexprs.items() if key in names}
        compute = "*fp64" if float64 else "*fp32"
        types = CRF_TYPES | dict.fromkeys(CRF_COMPUTED, compute) | out
        even = ("K",) if K % 16 == 0 else ()
        yield Job(
            f"crf.{CRF[name]}", name, dtype, constexprs, arch, num_warps, maxnreg, types, None, num_stages, even
        )  # fmt: skip


# ---- compiling


def compile_one(job: Job) -> Usage:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"seqkernels.triton.{job.module}"), job.kernel)
    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def type_of(path: tuple[int, ...], name: str, group: str = "") -> str:
        full = f"{group}.{name}"
        for key in (name, full):
            if key in job.constexprs:
                constexprs[path] = job.constexprs[key]
                return "constexpr"
        # As for tensors allocated by torch and sizes that are multiples of 16.
        even = ("H", "D", "s_row", "stride", "first", *job.even)
        if name.startswith("p_") or name in even or full in even:
            attributes[path] = [["tt.divisibility", 16]]
        return job.types.get(name, POINTER[job.dtype] if name.startswith("p_") else "i32")

    for i, name in enumerate(kernel.arg_names):
        group = groups().get(name)
        if group is None or name in job.constexprs:
            signature[name] = type_of((i,), name)
        else:
            signature[name] = group(*(type_of((i, j), field, name) for j, field in enumerate(group._fields)))
    try:
        built = triton.compile(
            ASTSource(kernel, signature, constexprs, attributes),
            target=GPUTarget("cuda", job.arch, 32),
            options=dict(num_warps=job.num_warps, num_stages=job.num_stages, maxnreg=job.maxnreg),
        )
    except Exception as error:
        return Usage(error=f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Usage(found["REG"], found["STACK"] + found["LOCAL"], built.metadata.shared)


def verdict(job: Job, used: Usage) -> str:
    """The problem of a configuration, or an empty text."""
    if used.error:
        return used.error
    if used.stack and not job.may_spill:
        return f"spills: {used.stack} bytes of stack"
    if used.shared > SHARED[job.arch]:
        return f"requires {used.shared} bytes of shared memory, available are {SHARED[job.arch]}"
    if job.shared is not None and used.shared > job.shared:
        return f"requires {used.shared} bytes of shared memory, the launcher expects {job.shared}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="configurations whose description matches this expression")
    parser.add_argument("--archs", type=int, nargs="+", default=ARCHS, choices=ARCHS)
    parser.add_argument("--write", type=Path, help="write a table of all configurations")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET must be unset to compile")
    every = (
        job
        for arch in options.archs
        for part in (bag_jobs, layer_jobs, step_jobs, attention_jobs, additive_attention_jobs, crf_jobs)
        for job in part(arch)
    )
    jobs = [job for job in every if re.search(options.only, str(job))]

    rows, wrong = [], 0
    worst: dict[tuple[str, str, int], list[int]] = {}
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for job, used in zip(jobs, pool.imap(compile_one, jobs, chunksize=4)):
            fault = verdict(job, used)
            if fault:
                wrong += 1
                print(f"{job}: {fault}", flush=True)
            rows.append(f"{job}\t{used.registers}\t{used.shared}\t{used.stack}\t{fault}")
            entry = worst.setdefault((job.kernel, SHORT[job.dtype], job.arch), [0, 0, 0, 0])
            entry[:] = [entry[0] + 1, *map(max, entry[1:], (used.registers, used.shared, used.stack))]
    print(f"{'kernel':40} {'type':5} {'arch':7} {'compiled':>8} {'registers':>9} {'shared':>7} {'spilled':>7}")
    for (kernel, dtype, arch), (count, *most) in sorted(worst.items()):
        print(f"{kernel:40} {dtype:5} sm_{arch:<4} {count:8} {most[0]:9} {most[1]:7} {most[2]:7}")
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        head = "configuration\tregisters\tshared\tspilled\tfault"
        options.write.write_text("\n".join([head, *rows]) + "\n")
    print(f"{len(jobs)} configurations, {wrong} of them wrong")
    return int(bool(wrong) or not jobs)


if __name__ == "__main__":
    sys.exit(main())
