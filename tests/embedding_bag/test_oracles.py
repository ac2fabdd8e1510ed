"""EmbeddingBag and Embedding against independent results: numpy, samples of torch, quantized tables of torch.

The samples are from torch's test suite: OpInfo of nn.functional.embedding_bag and nn.functional.embedding, dense and
nested, ModuleInfo of nn.Embedding, and the module tests in common_nn.

Dimensions: E table rows, D columns, N indices, B bags, L indices of one bag.
"""

from __future__ import annotations

import collections
import copy
import functools
import importlib
import itertools
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from seqkernels import functional, nn, reference
from support.cases import (
    BAG_CASES,
    BAG_MODES,
    DTYPES,
    BagCase,
    BagInputs,
    assert_bag_near,
    bag_definition,
    make_bag_inputs,
    run_bag,
)

ops = torch.ops.seqkernels
modes = pytest.mark.parametrize("mode", BAG_MODES)
cases = pytest.mark.parametrize("case", BAG_CASES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
float64 = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """Parallel loops may stall for milliseconds beside another busy process."""
    torch.set_num_threads(1)


# ---- numpy


def by_numpy(inputs: BagInputs) -> dict[str, Tensor]:
    """Output, gradients and selected positions in float64, computed index by index."""
    case, mode = inputs.case, inputs.mode
    table, dout = inputs.weight.double().numpy(), inputs.dout.double().numpy()
    rows = inputs.indices.flatten().tolist()
    weights = None if inputs.weights is None else inputs.weights.double().flatten().numpy()
    padding = None if case.padding_idx is None else case.padding_idx % case.E
    bags = [[k for k in range(*bounds) if rows[k] != padding] for bounds in inputs.bounds()]
    often = collections.Counter(rows[k] for bag in bags for k in bag)
    output, arg = np.zeros((case.B, case.D)), np.full((case.B, case.D), -1)
    dtable, dweights = np.zeros_like(table), np.zeros(len(rows))
    for b, (bag, (begin, _)) in enumerate(zip(bags, inputs.bounds())):
        if not bag:
            continue
        w = np.ones(len(bag)) if weights is None else weights[bag]
        found = table[[rows[k] for k in bag]]
        if mode in ("sum", "mean"):
            by_weight = mode == "mean" and case.weight_norm == "weight"
            divisor = 1 if mode == "sum" else w.sum() if by_weight else len(bag)
            output[b] = w @ found / divisor
            for k, weight, row in zip(bag, w, found):
                dtable[rows[k]] += dout[b] * weight / divisor / (often[rows[k]] if case.scale_grad_by_freq else 1)
                dweights[k] = dout[b] @ (row - output[b] if by_weight else row) / divisor
            continue
        weighted = w[:, None] * found
        best = (
            weighted.argmax(0) if mode == "max" else weighted.argmin(0)
        )  # the first NaN, otherwise the first of equal values
        for d, i in enumerate(best):
            k = bag[i]
            output[b, d], arg[b, d] = weighted[i, d], k - begin
            dtable[rows[k], d] += dout[b, d] * w[i] / (often[rows[k]] if case.scale_grad_by_freq else 1)
            dweights[k] += dout[b, d] * found[i, d]
    result = {"output": output, "dweight": dtable}
    result |= {} if weights is None else {"dweights": dweights.reshape(inputs.weights.shape)}
    return {name: torch.from_numpy(a) for name, a in result.items()} | {"arg": torch.from_numpy(arg).int()}


@functools.cache
def counted(case: BagCase, mode: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return by_numpy(make_bag_inputs(case, dtype, mode))


def without_arg(want: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in want.items() if name != "arg"}


@cases
def test_definition_and_kernels_match_numpy(case: BagCase) -> None:
    for mode in BAG_MODES:
        inputs, want = make_bag_inputs(case, torch.float64, mode), without_arg(counted(case, mode))
        assert_bag_near(bag_definition(inputs), want, inputs, slack=20)
        assert_bag_near(run_bag(functional.embedding_bag, inputs), want, inputs, slack=20)


@cases
def test_selected_positions_match_numpy(case: BagCase, isa: str) -> None:
    for mode, dtype in itertools.product(("max", "min"), (torch.float64, torch.bfloat16)):  # bfloat16 has equal values
        inputs = make_bag_inputs(case, dtype, mode)
        _, arg = ops.embedding_bag_forward(inputs.weight, *inputs.op_arguments())
        assert arg.dtype == torch.int32 and torch.equal(arg, counted(case, mode, dtype)["arg"]), (mode, dtype)


def test_reductions_of_numpy() -> None:
    """Larger sizes, with reduceat."""
    E, D, N = 500, 24, 6000
    g = np.random.default_rng(0)
    table, rows = g.standard_normal((E, D)), g.integers(0, E, N)
    offsets = np.concatenate([[0], np.sort(g.choice(np.arange(1, N), 799, replace=False))])
    counts = np.diff(np.append(offsets, N))[:, None]
    arguments = torch.from_numpy(rows), torch.from_numpy(table), torch.from_numpy(offsets)
    found = table[rows]
    for mode, want in {
        "sum": np.add.reduceat(found, offsets),
        "mean": np.add.reduceat(found, offsets) / counts,
        "max": np.maximum.reduceat(found, offsets),
        "min": np.minimum.reduceat(found, offsets),
    }.items():
        float64(functional.embedding_bag(*arguments, mode=mode), torch.from_numpy(want))


# ---- samples of torch


def torchs(module: str):
    """A module of torch.testing._internal, which requires expecttest."""
    pytest.importorskip("expecttest", reason="expecttest is not installed; torch.testing._internal requires it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"torch.testing._internal.{module}")


def op_samples(name: str, dtype: torch.dtype, requires_grad: bool = False):
    (info,) = (op for op in torchs("common_methods_invocations").op_db if op.name == f"nn.functional.{name}")
    torch.manual_seed(0)
    samples = list(info.sample_inputs("cpu", dtype, requires_grad=requires_grad))
    assert len(samples) >= 3
    return samples


def both(name: str, sample) -> tuple[list[Tensor], list[Tensor]]:
    """Results of seqkernels and torch: output, gradients, and the table, which max_norm modifies."""
    results = []
    for function in (getattr(functional, name), getattr(torch.nn.functional, name)):
        table = sample.input.detach().clone().requires_grad_()
        looked_up = table * 1 if sample.kwargs.get("max_norm") is None else table  # not a leaf, except for max_norm
        keywords = dict(sample.kwargs)
        weights = keywords.get("per_sample_weights")
        if weights is not None:
            weights = keywords["per_sample_weights"] = weights.detach().clone().requires_grad_()
        output = function(sample.args[0], looked_up, **keywords)
        upstream = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape).to(output.dtype)
        wanted = [table] if weights is None else [table, weights]
        if keywords.get("sparse"):
            wanted = wanted[1:]  # test_sparse_samples_of_torch compares them
        grads = torch.autograd.grad(output, wanted, upstream) if wanted else ()
        results.append([output, *grads, looked_up.detach()])
    return results[0], results[1]


@dtypes
@pytest.mark.parametrize("name", ["embedding_bag", "embedding"])
def test_samples_of_torch(name: str, dtype: torch.dtype) -> None:
    """Excludes scale_grad_by_freq, where torch divides by wrong counts (pytorch#190063); see test_torch_bugs.py."""
    if dtype.itemsize == 2 and not torch.__version__.startswith("2.13."):
        pytest.skip("the error of sums of half types in torch is only known for 2.13")
    for sample in op_samples(name, dtype):
        if sample.kwargs.get("scale_grad_by_freq") and name == "embedding_bag":
            continue
        ours, theirs = both(name, sample)
        half = dtype.itemsize == 2
        for got, want in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, want, **dict(rtol=2e-2, atol=2e-2) if half else {})


@dtypes
@pytest.mark.parametrize("name", ["embedding_bag", "embedding"])
def test_samples_of_torch_in_all_forms_of_call(name: str, dtype: torch.dtype) -> None:
    """Keyword arguments, a parameter of a module, no_grad and inference mode give the same bits."""
    function = getattr(functional, name)
    for sample in op_samples(name, dtype):
        table = sample.input.detach()
        want = function(sample.args[0], table.clone(), **sample.kwargs)
        parameter = torch.nn.Parameter(table.clone())
        assert torch.equal(function(input=sample.args[0], weight=parameter, **sample.kwargs), want)
        with torch.inference_mode():
            assert torch.equal(function(sample.args[0], table.clone(), **sample.kwargs), want)


@pytest.mark.parametrize("name", ["embedding_bag", "embedding"])
def test_gradients_of_samples_of_torch(name: str) -> None:
    """First and second derivatives; torch's embedding_bag has no second derivative."""
    for sample in op_samples(name, torch.float64, requires_grad=True):
        keywords = dict(sample.kwargs)
        weights = keywords.pop("per_sample_weights", None)
        tensors = [sample.input.detach().requires_grad_()]
        tensors += [] if weights is None else [weights.detach().requires_grad_()]
        if keywords.get("padding_idx") is not None and name == "embedding":
            continue  # the documented gradient is not the derivative

        def call(table: Tensor, *w: Tensor, indices=sample.args[0], keywords=keywords) -> Tensor:
            more = {"per_sample_weights": w[0]} if w else {}
            return getattr(functional, name)(indices, table, **keywords, **more)

        assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


def test_sparse_samples_of_torch() -> None:
    for name in ("embedding_bag", "embedding"):
        for sample in op_samples(name, torch.float64):
            if not sample.kwargs.get("sparse") or sample.kwargs.get("scale_grad_by_freq"):
                continue
            grads = []
            for function in (getattr(functional, name), getattr(torch.nn.functional, name)):
                table = sample.input.detach().clone().requires_grad_()
                function(sample.args[0], table, **sample.kwargs).square().sum().backward()
                assert table.grad.is_sparse
                grads.append(table.grad.to_dense())
            float64(*grads)


def test_error_samples_of_torch_for_embedding() -> None:
    (info,) = (op for op in torchs("common_methods_invocations").op_db if op.name == "nn.functional.embedding")
    found = 0
    for bad in info.error_inputs("cpu"):
        sample, found = bad.sample_input, found + 1
        with pytest.raises((bad.error_type, ValueError, TypeError)):
            functional.embedding(sample.args[0], sample.input, **sample.kwargs)
    assert found


def test_nested_samples_of_torch() -> None:
    nested = torchs("opinfo.definitions.nested")
    for name in ("embedding_bag", "embedding"):
        samples = getattr(nested, f"sample_inputs_nn_functional_{name}")
        for sample in samples(None, "cpu", torch.float64, requires_grad=False):
            table = sample.input.detach()
            got = getattr(functional, name)(sample.args[0], table, **sample.kwargs)
            want = getattr(torch.nn.functional, name)(sample.args[0], table, **sample.kwargs)
            if want.is_nested:
                assert got.is_nested and torch.equal(got.offsets(), want.offsets())
                got, want = got.values(), want.values()
            float64(got, want)


def swapped(constructor, *arguments):
    """Calls a constructor of torch's tests with the classes of seqkernels."""
    theirs = torch.nn.EmbeddingBag, torch.nn.Embedding
    torch.nn.EmbeddingBag, torch.nn.Embedding = nn.EmbeddingBag, nn.Embedding
    try:
        return constructor(*arguments)
    finally:
        torch.nn.EmbeddingBag, torch.nn.Embedding = theirs


def module_samples() -> dict:
    """Module tests of torch: name, constructor and input."""
    found = {}
    common = torchs("common_nn")
    listed = getattr(common, "get_new_module_tests", lambda: common.new_module_tests)  # depends on the release
    for test in listed():
        name = test.get("fullname") or f"{test.get('module_name')}_{test.get('desc', '')}"
        if "Embedding" not in name or "Loss" in name:
            continue
        make = test.get("constructor")
        if make is None:
            make = functools.partial(lambda t: getattr(torch.nn, t["module_name"])(*t["constructor_args"]), test)
        found[name] = make, test["input_fn"]
    return found


def test_module_tests_of_torch() -> None:
    samples = module_samples()
    assert len(samples) >= 10
    for name, (make, input_of) in samples.items():
        torch.manual_seed(0)
        theirs = make().double()
        torch.manual_seed(0)
        ours, x = swapped(make).double(), input_of()
        assert type(ours) in (nn.EmbeddingBag, nn.Embedding), name
        grads = []
        for module in (ours, theirs):
            output = module(x)
            output.square().sum().backward()
            grads.append([output, module.weight.grad.to_dense()])
            assert module.weight.grad.is_sparse == ("sparse" in name)
        for got, want in zip(*grads, strict=True):
            float64(got, want, msg=lambda text, name=name: f"{name}: {text}")
        if "sparse" not in name:
            parameters = {"weight": ours.weight.detach().requires_grad_()}

            def call(w: Tensor, module=ours, x=x) -> Tensor:
                return torch.func.functional_call(module, {"weight": w}, (x,))

            assert torch.autograd.gradcheck(call, tuple(parameters.values()), fast_mode=True)


def module_info():
    common = torchs("common_modules")
    (info,) = (i for i in common.module_db if i.module_cls is torch.nn.Embedding)
    return info, common


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_samples_of_torch_for_the_embedding_module(dtype: torch.dtype) -> None:
    """test_forward, test_pickle, test_repr and test_grad of torch's test_modules.py."""
    info, _ = module_info()
    torch.manual_seed(0)
    for sample in info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=True):
        constructor, forward = sample.constructor_input, sample.forward_input
        made = []
        for cls in (nn.Embedding, torch.nn.Embedding):
            torch.manual_seed(1)
            made.append(cls(*constructor.args, **constructor.kwargs, dtype=dtype))
        ours, theirs = made
        got = ours(*forward.args, **forward.kwargs)
        assert torch.equal(got, theirs(*forward.args, **forward.kwargs)) and repr(ours) == repr(theirs)
        for copied in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
            assert torch.equal(copied(*forward.args), got)
        for module in made:
            module(*forward.args).square().sum().backward()
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-5)  # of 3584 lookups


def test_error_samples_of_torch_for_the_embedding_module() -> None:
    """test_errors of torch's test_modules.py; errors in forward have other texts."""
    info, common = module_info()
    if info.module_error_inputs_func is None:
        pytest.skip(f"torch {torch.__version__} has no such samples")
    kinds = set()
    for bad in info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    ):
        constructor, forward = bad.module_error_input.constructor_input, bad.module_error_input.forward_input
        kinds.add(bad.error_on)
        if bad.error_on == common.ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises((bad.error_type, ValueError)):
                nn.Embedding(*constructor.args, **constructor.kwargs)
        else:
            module = nn.Embedding(*constructor.args, **constructor.kwargs)
            with pytest.raises((bad.error_type, RuntimeError, ValueError, TypeError), match=r"embedding.* must"):
                module(*forward.args, **forward.kwargs)
    assert len(kinds) == 2


# ---- quantized tables of torch


QUANTISED = [
    BagCase(E=11, D=7, lengths=(4, 1, 0, 2), why="odd"),
    BagCase(E=11, D=16, lengths=(4, 1, 0, 2), form="last", weights="same", why="last offset, weights"),
    BagCase(E=30, D=64, lengths=(9, 0, 20, 3), weights="same", index=torch.int32, offset=torch.int32, why="int32"),
    BagCase(E=30, D=1, lengths=(3,) * 6, form="2-D", why="one column, 2-D"),
]


def torch_rows(table: Tensor) -> Tensor:
    return torch.ops.quantized.embedding_bag_byte_prepack(table)


@pytest.mark.parametrize("D", [1, 7, 8, 16, 33, 300])
def test_packed_rows_match_torch(D: int) -> None:
    """Equal bits, including scale and bias, also for constant rows."""
    table = torch.randn(20, D) * torch.logspace(-3, 3, 20)[:, None]
    table[3] = 0
    table[4] = -2.5
    assert torch.equal(ops.embedding_bag_pack_bytes(table), torch_rows(table))


@pytest.mark.parametrize("case", QUANTISED, ids=str)
def test_quantized_sum_matches_torch(case: BagCase, isa: str) -> None:
    inputs = make_bag_inputs(case, torch.float32, "sum")
    packed = torch_rows(inputs.weight)
    want = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
        packed, inputs.indices, inputs.offsets, False, 0, False, inputs.weights, None, case.form == "last"
    )
    got = ops.embedding_bag_bytes(packed, *inputs.op_arguments())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [*QUANTISED, *[c for c in BAG_CASES if c.E and c.D]], ids=str)
def test_quantized_table_matches_unpacked_table_of_torch(case: BagCase, isa: str) -> None:
    for mode in BAG_MODES:
        inputs = make_bag_inputs(case, torch.float32, mode)
        packed = torch_rows(inputs.weight)
        inputs.weight = torch.ops.quantized.embedding_bag_byte_unpack(packed)
        got = ops.embedding_bag_bytes(packed, *inputs.op_arguments())
        want = reference.embedding_bag(
            inputs.indices, inputs.weight.double(), **inputs.keywords(),
            per_sample_weights=None if inputs.weights is None else inputs.weights.double(),
        )  # fmt: skip
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-5)
