"""Direct paths of eager calls: the results, gradients and errors of the general paths, in every use of autograd.

A mode of __torch_dispatch__ or a torch.func transform excludes the direct path of a call, which is so compared with the
general one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import seqkernels
from seqkernels.functional import _values, ctc_loss, embedding, embedding_bag

LARGE = 4500  # more indices than torch.embedding is given where a gradient is required


class PassThrough(TorchDispatchMode):
    """Runs each op as it is."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        return function(*arguments, **(keywords or {}))


def general(function: Callable, *arguments, **keywords):
    """The call without its direct path."""
    with PassThrough():
        assert _values.moded()
        return function(*arguments, **keywords)


def error_of(function: Callable[[], object]) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011  (callers compare it)
        function()
    return type(caught.value), str(caught.value)


# ---- Embedding


@pytest.mark.parametrize("recorded", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (44,), (4, 11), (LARGE,), (3, 1500), (0,), (0, 4)], ids=str)
def test_rows_equal_those_of_the_general_path(shape: tuple[int, ...], dtype: torch.dtype, recorded: bool) -> None:
    table = torch.randn(50, 17, dtype=dtype).requires_grad_(recorded)
    input = torch.randint(50, shape)
    got, want = embedding(input, table), general(embedding, input, table)
    assert torch.equal(got, want) and got.requires_grad == want.requires_grad == recorded
    assert torch.equal(embedding(input.int(), table), want)


@pytest.mark.parametrize("size", [200, 5000], ids=["short", "long"])
@pytest.mark.parametrize("D", [1, 3, 8, 17, 100, 256])
def test_copies_of_large_lookups(D: int, size: int, threads: None) -> None:
    """Rows of widths around a vector's, in tables of any strides, with one thread and with two."""
    wide = torch.randn(300, 2 * D + 1)
    for table in (wide[:, :D], wide[:, ::2][:, :D], wide[::2, 1 : D + 1]):
        for input in (torch.randint(table.shape[0], (size, 1)), torch.randint(table.shape[0], (size, 1)).int()):
            for mode in ("sum", "mean"):
                for count in (1, 2):
                    torch.set_num_threads(count)
                    assert torch.equal(embedding_bag(input, table, mode=mode), table[input[:, 0].long()])
    with pytest.raises(IndexError, match=r"indices in \[0, 300\), got 300 at position 7"):
        embedding_bag(torch.where(torch.arange(size)[:, None] == 7, 300, 0), wide[:, :D], mode="sum")


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 44, LARGE])
def test_gradients_equal_those_of_the_general_path(n: int, dtype: torch.dtype, options: dict) -> None:
    table = torch.randn(60, 5, dtype=dtype).requires_grad_()
    input, upstream = torch.randint(60, (n,)), torch.randn(n, 5, dtype=dtype)
    outputs = embedding(input, table, **options), general(embedding, input, table, **options)
    found, want = (torch.autograd.grad(output, table, upstream)[0] for output in outputs)
    assert found.is_sparse == want.is_sparse == bool(options.get("sparse"))
    if found.is_sparse:
        assert found.is_coalesced() and torch.equal(found.indices(), want.indices())
        found, want = found.to_dense(), want.to_dense()
    torch.testing.assert_close(found, want)
    if "padding_idx" in options:
        assert not found[2].any()


def test_output_of_a_recorded_lookup_is_no_view() -> None:
    table = torch.randn(60, 5, requires_grad=True)
    for shape in ((4,), (2, 3), (3, 1500)):
        embedding(torch.randint(60, shape), table).mul_(2).sum().backward()


def test_tables_are_not_saved() -> None:
    """A table may be modified before backward, as by an optimiser that shares it."""
    for n in (4, LARGE):
        table = torch.randn(60, 5, requires_grad=True)
        output = embedding(torch.randint(60, (n,)), table)
        with torch.no_grad():
            table.mul_(2)
        output.sum().backward()


INVALID = {
    "index": lambda: (torch.tensor([60]), torch.randn(60, 5)),
    "negative index": lambda: (torch.tensor([-1]), torch.randn(60, 5)),
    "float index": lambda: (torch.tensor([1.0]), torch.randn(60, 5)),
    "int16 index": lambda: (torch.tensor([1], dtype=torch.int16), torch.randn(60, 5)),
    "meta index": lambda: (torch.zeros(3, dtype=torch.int64, device="meta"), torch.randn(60, 5)),
    "nested index": lambda: (torch.nested.nested_tensor([torch.tensor([1, 2])]), torch.randn(60, 5)),
    "1-D table": lambda: (torch.tensor([1]), torch.randn(60)),
    "sparse table": lambda: (torch.tensor([1]), torch.randn(60, 5).to_sparse()),
    "nested table": lambda: (torch.tensor([1]), torch.nested.nested_tensor([torch.randn(3, 5)])),
    "meta table": lambda: (torch.tensor([1]), torch.randn(60, 5, device="meta")),
    "empty table": lambda: (torch.tensor([0]), torch.randn(0, 5)),
    "complex table": lambda: (torch.tensor([1]), torch.randn(60, 5, dtype=torch.complex64), None, 2.0),
    "padding": lambda: (torch.tensor([1]), torch.randn(60, 5), 60),
    "padding of type float": lambda: (torch.tensor([1]), torch.randn(60, 5), 1.0),
}


@pytest.mark.parametrize("recorded", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("why", INVALID)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_errors_equal_those_of_the_general_path(why: str, recorded: bool) -> None:
    input, table, *rest = INVALID[why]()
    if recorded:
        table = table.requires_grad_()
    found = error_of(lambda: embedding(input, table, *rest))
    assert found[1].startswith("embedding: ") and issubclass(
        found[0], (IndexError, TypeError, ValueError, NotImplementedError)
    )
    if why != "nested index":  # the mode does not support nested tensors
        assert found == error_of(lambda: general(embedding, input, table, *rest))


@pytest.mark.parametrize("n", [1, LARGE])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_complex_tables_have_no_gradient(n: int, sparse: bool) -> None:
    table = torch.randn(60, 5, dtype=torch.complex64, requires_grad=True)
    input = torch.randint(60, (n,))
    with pytest.raises(TypeError, match="embedding: weight must be float32, float64, bfloat16 or float16 if it req"):
        embedding(input, table, sparse=sparse)
    assert torch.equal(embedding(input, table.detach()), table.detach()[input])


def test_tables_of_other_types_keep_the_general_path() -> None:
    class Subclass(Tensor):
        pass

    table = torch.randn(6, 5).as_subclass(Subclass)
    assert type(embedding(torch.tensor([1]), table)) is Subclass
    counts = torch.arange(12).view(6, 2)
    assert torch.equal(embedding(torch.tensor([[1, 5]]), counts), counts[torch.tensor([[1, 5]])])


# ---- all direct paths, in every use of autograd


def _rows(n: int, **options) -> Callable[[], tuple[Callable[[Tensor], Tensor], Tensor]]:
    def make() -> tuple[Callable[[Tensor], Tensor], Tensor]:
        input, factors = torch.randint(6, (n,)), torch.randn(n, 2, dtype=torch.float64)
        return lambda table: (embedding(input, table, **options) * factors).sum(0), torch.randn(6, 2).double()

    return make


def _bags(mode: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    input, offsets = torch.tensor([1, 4, 2, 4, 0]), torch.tensor([0, 3, 3])
    return lambda table: embedding_bag(input, table, offsets, mode=mode), torch.randn(6, 2, dtype=torch.float64)


def _layer(name: str, **options) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    module = getattr(seqkernels.nn, name)(2, 3, dtype=torch.float64, **options)

    def output(x: Tensor) -> Tensor:
        y, last = module(x)
        return y.sum() + (last[0] * last[1] if isinstance(last, tuple) else last.square()).sum()

    return output, torch.randn(3, 2, 2, dtype=torch.float64)


def _cell(name: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    module = getattr(seqkernels.nn, name)(2, 3, dtype=torch.float64)

    def output(x: Tensor) -> Tensor:
        states = module(x)
        return (states[0] * states[1] if isinstance(states, tuple) else states.square()).sum()

    return output, torch.randn(2, 2, dtype=torch.float64)


def _ctc() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    targets, steps, labels = torch.tensor([[1, 2], [2, 2]]), torch.tensor([5, 4]), torch.tensor([2, 1])
    loss = seqkernels.nn.CTCLoss()
    return lambda x: loss(x.log_softmax(-1), targets, steps, labels), torch.randn(5, 2, 3, dtype=torch.float64)


def _crf() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    crf, tags = seqkernels.nn.CRF(3, batch_first=True, dtype=torch.float64), torch.tensor([[0, 2, 1], [1, 1, 0]])
    return lambda x: crf(x, tags), torch.randn(2, 3, 3, dtype=torch.float64)


CALLS = {
    "few rows": _rows(5),
    "many rows": _rows(LARGE),
    "rows, padding": _rows(LARGE, padding_idx=1),
    "sum": lambda: _bags("sum"),
    "mean": lambda: _bags("mean"),
    "LSTM": lambda: _layer("LSTM"),
    "GRU, two layers, two directions": lambda: _layer("GRU", num_layers=2, bidirectional=True),
    "RNN": lambda: _layer("RNN"),
    "LSTMCell": lambda: _cell("LSTMCell"),
    "GRUCell": lambda: _cell("GRUCell"),
    "RNNCell": lambda: _cell("RNNCell"),
    "CTC": _ctc,
    "CRF": _crf,
}
calls = pytest.mark.parametrize("name", CALLS)
# The gradient of the padding row is zero by definition; the derivative is not.
derivatives = pytest.mark.parametrize("name", [name for name in CALLS if "padding" not in name])


def _case(name: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    torch.manual_seed(0)
    return CALLS[name]()


@calls
def test_results_equal_those_under_a_mode(name: str) -> None:
    function, x = _case(name)
    found, want = x.clone().requires_grad_(), x.clone().requires_grad_()
    outputs = function(found), general(function, want)
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(found.grad, want.grad)


@derivatives
def test_derivatives(name: str) -> None:
    """First and second derivatives, and several vectors at once."""
    function, x = _case(name)
    x.requires_grad_()
    torch.autograd.gradcheck(function, x, check_batched_grad=True)
    torch.autograd.gradgradcheck(lambda t: function(t).square(), x)


@derivatives
def test_torch_func_equals_eager_mode(name: str) -> None:
    function, x = _case(name)
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(function(leaf).square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda t: function(t).square().sum())(x), want)
    _, tangent = torch.func.jvp(lambda t: function(t).square().sum(), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, want.sum())


@calls
def test_hooks_and_checkpoint(name: str) -> None:
    function, x = _case(name)
    found = []
    for how in ("plain", "hooks", "checkpoint"):
        leaf = x.clone().requires_grad_()
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t)
            if how == "hooks"
            else (torch.enable_grad())
        ):
            output = checkpoint(function, leaf, use_reentrant=False) if how == "checkpoint" else function(leaf)
        output.square().sum().backward()
        found.append(leaf.grad)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", ["few rows", "many rows", "sum", "LSTM", "GRUCell", "CTC", "CRF"])
def test_torch_compile_equals_eager_mode(name: str) -> None:
    torch._dynamo.reset()
    function, x = _case(name)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    found, want = x.clone().requires_grad_(), x.clone().requires_grad_()
    outputs = compiled(found), function(want)
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(found.grad, want.grad)


# ---- CTC


def _ctc_arguments() -> list:
    steps, labels = torch.tensor([5, 4]), torch.tensor([2, 1])
    return [torch.randn(5, 2, 4).log_softmax(-1), torch.tensor([[1, 2], [2, 2]]), steps, labels]


def test_lengths_of_all_forms_give_the_same_loss() -> None:
    log_probs, targets, steps, labels = _ctc_arguments()
    want = general(ctc_loss, log_probs, targets, steps, labels)
    for form in (Tensor.clone, Tensor.tolist, lambda t: tuple(t.tolist()), Tensor.int):
        assert torch.equal(ctc_loss(log_probs, targets, form(steps), form(labels)), want)


@pytest.mark.parametrize(
    ("at", "wrong"),
    [
        (0, torch.zeros(2, 4, dtype=torch.float64)),
        (1, torch.tensor([[1, 4], [2, 2]])),
        (1, torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.complex64)),
        (2, torch.tensor([5, 6])),
        (2, torch.tensor([5])),
        (2, torch.tensor([5.0, 4.0])),
        (2, [5, 4.5]),
        (2, torch.tensor([5, 4], device="meta")),
        (3, torch.tensor([2, 3])),
        (3, [2, "1"]),
        (4, 4),
        (5, "average"),
    ],
    ids=str,
)
def test_errors_of_ctc_loss(at: int, wrong: object) -> None:
    given = [*_ctc_arguments(), 0, "mean"]
    given[at] = wrong
    found = error_of(lambda: ctc_loss(*given))
    assert found == error_of(lambda: general(ctc_loss, *given))
