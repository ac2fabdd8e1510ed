"""`seqkernels.nn.LSTM` as a replacement of `torch.nn.LSTM`: torch's module tests, and typical usage."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from seqkernels.nn import LSTM
from support.cases import Case, assert_near, make_inputs, module_of, ragged, run_module
from support.recurrent import everything

CONSTRUCTORS = [
    dict(input_size=5, hidden_size=7),
    dict(input_size=5, hidden_size=7, num_layers=2, bidirectional=True),
    dict(input_size=5, hidden_size=7, bias=False, batch_first=True),
    dict(input_size=5, hidden_size=7, num_layers=3, proj_size=4, dropout=0.25, bidirectional=True),
]
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
constructors = pytest.mark.parametrize("arguments", CONSTRUCTORS, ids=lambda a: "-".join(map(str, a.values())))


def pair(seed: int = 0, **arguments) -> tuple[LSTM, torch.nn.LSTM]:
    """The modules of seqkernels and torch with the same seed."""
    torch.manual_seed(seed)
    ours = LSTM(**arguments)
    torch.manual_seed(seed)
    return ours, torch.nn.LSTM(**arguments)


# ---- tests of torch


def module_info():
    """Inputs and invalid inputs of nn.LSTM in torch's test suite."""
    pytest.importorskip("expecttest", reason="expecttest is not installed; torch.testing._internal requires it")
    pytest.importorskip("numpy", reason="numpy is not installed; torch.testing._internal requires it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal import common_modules
    (info,) = (i for i in common_modules.module_db if i.module_cls is torch.nn.LSTM)
    return info, common_modules


def samples(dtype: torch.dtype, training: bool, requires_grad: bool = False):
    info, _ = module_info()
    for sample in info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training
    ):
        constructor, forward = sample.constructor_input, sample.forward_input
        torch.manual_seed(0)
        module = LSTM(*constructor.args, **constructor.kwargs, dtype=dtype).train(training)
        yield module, forward, sample.reference_fn, constructor


modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_samples_of_torch(dtype: torch.dtype, training: bool) -> None:
    """test_forward of torch's test_modules.py, against the reference function and the class of torch."""
    for module, forward, reference, constructor in samples(dtype, training):
        got = module(*forward.args, **forward.kwargs)
        if reference is not None:
            torch.testing.assert_close(got, reference(module, *forward.args))
        torch.manual_seed(0)
        theirs = torch.nn.LSTM(*constructor.args, **constructor.kwargs, dtype=dtype).train(training)
        torch.testing.assert_close(got, theirs(*forward.args, **forward.kwargs))


@modes
def test_gradients_of_samples_of_torch(training: bool) -> None:
    """test_grad and test_gradgrad of torch's test_modules.py."""
    torch.set_num_threads(1)
    for module, forward, _, _ in samples(torch.float64, training, requires_grad=True):
        state = forward.args[1] if len(forward.args) > 1 else ()
        tensors = [forward.args[0], *state, *module.parameters()]
        names, n = list(dict(module.named_parameters())), len(state)

        def call(x, *rest, module=module, names=names, n=n):
            arguments = (x, rest[:n]) if n else (x,)
            y, hx = torch.func.functional_call(module, dict(zip(names, rest[n:], strict=True)), arguments)
            return y, *hx

        assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
        if training:
            assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


def test_samples_of_torch_with_strides() -> None:
    """test_non_contiguous_tensors of torch's test_modules.py."""
    for module, forward, _, _ in samples(torch.float32, True):
        spread = torch.utils._pytree.tree_map(lambda t: torch.stack([t, t], -1)[..., 0], forward.args)
        want, got = everything(module, *forward.args), everything(module, *spread)
        assert all(torch.equal(got[n], want[n]) for n in want)


@modes
def test_pickle_deepcopy_and_repr_of_samples_of_torch(training: bool) -> None:
    """test_pickle and test_repr of torch's test_modules.py."""
    for module, forward, _, _ in samples(torch.float32, training):
        want = module(*forward.args)
        for copied in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
            torch.testing.assert_close(copied(*forward.args), want, rtol=0, atol=0)
        assert repr(module) and str(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_error_samples_of_torch(dtype: torch.dtype) -> None:
    """test_errors of torch's test_modules.py."""
    info, common = module_info()
    kinds = set()
    for bad in info.module_error_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=True):
        constructor, forward = bad.module_error_input.constructor_input, bad.module_error_input.forward_input
        kinds.add(bad.error_on)
        if bad.error_on == common.ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(bad.error_type, match=bad.error_regex):
                LSTM(*constructor.args, **constructor.kwargs)
        else:
            module = LSTM(*constructor.args, **constructor.kwargs)
            with pytest.raises(bad.error_type, match=bad.error_regex):
                module(*forward.args, **forward.kwargs)
    assert len(kinds) == 2


# ---- modules


@constructors
def test_parameters_match_torch(arguments: dict) -> None:
    ours, theirs = pair(**arguments)
    for (n, p), (m, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert n == m and torch.equal(p, q) and p.dtype == q.dtype and p.requires_grad
    assert ours.all_weights and [len(w) for w in ours.all_weights] == [len(w) for w in theirs.all_weights]
    torch.manual_seed(3)
    ours.reset_parameters()
    torch.manual_seed(3)
    theirs.reset_parameters()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@constructors
def test_repr_and_attributes_match_torch(arguments: dict) -> None:
    ours, theirs = pair(**arguments)
    assert repr(ours) == repr(theirs)
    for name in torch.nn.LSTM.__constants__:
        assert getattr(ours, name) == getattr(theirs, name)
    assert isinstance(ours, torch.nn.RNNBase) and not isinstance(ours, torch.nn.LSTM)


def test_positional_arguments() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, theirs = pair(input_size=2, hidden_size=5)
        by_position = (2, 5, 2, False, True, 0.5, True, 3, "cpu", torch.float64)
        assert repr(LSTM(*by_position)) == repr(torch.nn.LSTM(*by_position))
        assert next(LSTM(*by_position).parameters()).dtype == torch.float64
        assert repr(LSTM(2, 5)) == repr(ours) == repr(theirs)


@constructors
def test_state_dict_exchange_with_torch(arguments: dict) -> None:
    ours, theirs = pair(**arguments)[0], pair(seed=1, **arguments)[1]
    x = torch.randn(4, 3, 5)
    before = theirs.eval()(x)[0]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.eval().load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x)[0], before)
    buffer = io.BytesIO()
    torch.save(pair(seed=2, **arguments)[0].state_dict(), buffer)
    buffer.seek(0)
    theirs.load_state_dict(torch.load(buffer, weights_only=True))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    assert ours.weight_ih_l0.data_ptr() == theirs.weight_ih_l0.data_ptr()


def test_saved_module_loads(tmp_path) -> None:
    ours, _ = pair(input_size=5, hidden_size=7)
    torch.save(ours, tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    x = torch.randn(4, 3, 5)
    assert torch.equal(loaded(x)[0], ours(x)[0])


# ---- results

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("form", ["batched", "batch first", "unbatched", "packed", "unsorted"])
@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
@pytest.mark.parametrize("P", [0, 3])
def test_results_match_torch_in_each_form(form: str, state: bool, P: int, dtype: torch.dtype) -> None:
    arguments = dict(input_size=5, hidden_size=7, num_layers=2, bidirectional=True, proj_size=P)
    ours, theirs = pair(**arguments, batch_first=form == "batch first", dtype=dtype)
    lengths = [2, 6, 1, 4]
    if form == "batched":
        x = torch.randn(6, 4, 5, dtype=dtype)
    elif form == "batch first":
        x = torch.randn(4, 6, 5, dtype=dtype)
    elif form == "unbatched":
        x = torch.randn(6, 5, dtype=dtype)
    else:
        ordered = sorted(lengths, reverse=True) if form == "packed" else lengths
        x = pack_sequence([torch.randn(n, 5, dtype=dtype) for n in ordered], enforce_sorted=form == "packed")
    batch = () if form == "unbatched" else (4,)
    hx = (torch.randn(4, *batch, P or 7, dtype=dtype), torch.randn(4, *batch, 7, dtype=dtype))
    call = (x, hx) if state else (x,)
    got, want = everything(ours, *call), everything(theirs, *call)
    if dtype in (torch.bfloat16, torch.float16):  # torch rounds more often: compare both with float64
        want = {n: t.to(dtype) for n, t in everything(theirs.double(), *to(call, torch.float64)).items()}
    assert_near(got, want, dtype)


def to(a, dtype: torch.dtype):
    if isinstance(a, PackedSequence):
        return a.to(dtype)
    return tuple(to(b, dtype) for b in a) if isinstance(a, tuple) else a.to(dtype)


def test_packed_output_matches_torch() -> None:
    ours, theirs = pair(input_size=5, hidden_size=7)
    x = pack_sequence([torch.randn(n, 5) for n in (2, 6, 1)], enforce_sorted=False)
    (y, (h_n, _)), (z, (h, _)) = ours(x), theirs(x)
    assert isinstance(y, PackedSequence)
    for a, b in zip(y[1:], z[1:], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(pad_packed_sequence(y), pad_packed_sequence(z))
    torch.testing.assert_close(h_n, h)
    for n, b in zip((2, 6, 1), range(3), strict=True):
        assert torch.equal(h_n[0, b], pad_packed_sequence(y)[0][n - 1, b])


def test_lengths_match_packing_and_unpacking() -> None:
    ours, theirs = pair(input_size=5, hidden_size=7, num_layers=2, bidirectional=True, batch_first=True)
    x, lengths = torch.randn(4, 6, 5), torch.tensor([2, 6, 1, 4])
    y, (h_n, c_n) = ours(x, lengths=lengths)
    z, (h, c) = theirs(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    torch.testing.assert_close(y, pad_packed_sequence(z, batch_first=True)[0])
    torch.testing.assert_close((h_n, c_n), (h, c))


def test_views_of_outputs() -> None:
    """`output.view(T, B, directions, H)` and `h_n.view(L, directions, B, H)`, as in torch's documentation."""
    module = LSTM(5, 7, num_layers=2, bidirectional=True)
    y, (h_n, c_n) = module(torch.randn(6, 4, 5))
    forward, reverse = y.view(6, 4, 2, 7).unbind(2)
    last = h_n.view(2, 2, 4, 7)[1]
    assert torch.equal(forward[-1], last[0]) and torch.equal(reverse[0], last[1])
    assert c_n.is_contiguous()


@pytest.mark.parametrize("dropout", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_dropout_masks_match_torch(dropout: float, form: str) -> None:
    ours, theirs = pair(input_size=5, hidden_size=16, num_layers=3, dropout=dropout, bidirectional=True)
    x = torch.randn(6, 4, 5)
    x = pack_padded_sequence(x, torch.tensor([6, 5, 2, 1])) if form == "packed" else x
    results = []
    for module in (ours, theirs):
        torch.manual_seed(5)
        results.append(everything(module, x))
    assert_near(*results, torch.float32)
    evaluated = [everything(m.eval(), x) for m in (ours, theirs)]
    assert_near(*evaluated, torch.float32)
    assert torch.equal(evaluated[0]["y"], results[0]["y"]) == (dropout == 0.0)


@pytest.mark.parametrize("dropout", [0.2, 0.5])
def test_dropout_rate_and_scale(dropout: float) -> None:
    """The first layer returns ones and the second exposes its input, which is 0 or 1 / (1 - p)."""
    H, n = 8, 4000
    module = LSTM(1, H, num_layers=2, dropout=dropout)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        module.bias_ih_l0.fill_(50.0)  # all gates are 1, so that c grows by 1 per step and h = tanh(c)
        module.weight_ih_l1[2 * H : 3 * H] = torch.eye(H) * 0.1  # c of layer 1 adds half of tanh(0.1 x)
        module.bias_ih_l1[:H] = 50.0
        module.bias_ih_l1[H : 2 * H] = -50.0
    _, (h_n, c_n) = module(torch.zeros(1, n, 1))
    h0 = float(torch.tanh(torch.tensor(1.0)))
    arrived = torch.atanh(c_n[1]) / 0.1 / h0
    kept = arrived.abs() > 1e-3
    torch.testing.assert_close(arrived[kept], torch.full_like(arrived[kept], 1 / (1 - dropout)), rtol=1e-3, atol=0)
    deviation = (dropout * (1 - dropout) / kept.numel()) ** 0.5
    assert abs(kept.double().mean().item() - (1 - dropout)) < 4 * deviation
    assert torch.equal(h_n[0], torch.full_like(h_n[0], h0)) or (h_n[0] - h0).abs().max() < 1e-6


def test_dropout_masks_differ_between_calls_and_steps() -> None:
    module = LSTM(5, 7, num_layers=2, dropout=0.5)
    x = torch.randn(6, 4, 5)
    assert not torch.equal(module(x)[0], module(x)[0])
    assert torch.equal(module.eval()(x)[0], module(x)[0])


# ---- usage


def test_training_matches_torch() -> None:
    """Twenty steps of Adam with the same seed give close weights."""
    ours, theirs = pair(input_size=5, hidden_size=16, num_layers=2, bidirectional=True)
    g = torch.Generator().manual_seed(0)
    x, target = torch.randn(7, 4, 5, generator=g), torch.randn(7, 4, 32, generator=g)
    for module in (ours, theirs):
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            (module(x)[0] - target).square().mean().backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-3)


def test_backward_in_eval_mode() -> None:
    ours, theirs = pair(input_size=5, hidden_size=7, num_layers=2, dropout=0.5)
    x = torch.randn(6, 4, 5)
    assert_near(everything(ours.eval(), x), everything(theirs.eval(), x), torch.float32)


def test_frozen_parameters() -> None:
    ours, theirs = pair(input_size=5, hidden_size=7)
    for module in (ours, theirs):
        module.weight_hh_l0.requires_grad_(False)
        module.bias_ih_l0.requires_grad_(False)
    x = torch.randn(6, 4, 5)
    assert_near(everything(ours, x), everything(theirs, x), torch.float32)


def test_gradient_of_a_shared_state() -> None:
    """A parameter expanded over layers and batch, and a tensor used as h0 and c0."""
    ours, theirs = pair(input_size=5, hidden_size=7, num_layers=2, bidirectional=True)
    x, grads = torch.randn(6, 4, 5), []
    for module in (ours, theirs):
        state = torch.linspace(-1, 1, 7).requires_grad_()
        hx = state.expand(4, 4, 7)
        y, (h_n, c_n) = module(x, (hx, hx))
        (y.square().sum() + h_n.sum() + c_n.sum()).backward()
        grads.append(state.grad)
    torch.testing.assert_close(*grads)


def test_gradients_of_two_calls_accumulate() -> None:
    ours, theirs = pair(input_size=5, hidden_size=7)
    a, b = torch.randn(6, 4, 5), torch.randn(2, 3, 5)
    for module in (ours, theirs):
        (module(a)[0].sum() + module(b)[0].square().sum()).backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_gradient_through_states_of_several_calls() -> None:
    ours, theirs = pair(input_size=5, hidden_size=7, num_layers=2)
    x = torch.randn(9, 4, 5)
    for module in (ours, theirs):
        hx, loss = None, 0
        for chunk in x.split(3):
            y, hx = module(chunk, hx)
            loss = loss + y.square().sum()
        loss.backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_tied_weights() -> None:
    ours, theirs = pair(input_size=7, hidden_size=7, num_layers=2)
    for module in (ours, theirs):
        module.weight_hh_l1 = module.weight_hh_l0
        module.weight_ih_l1 = module.weight_hh_l0
    x = torch.randn(6, 4, 7)
    assert len(list(ours.parameters())) == len(list(theirs.parameters())) == 6
    assert_near(everything(ours, x), everything(theirs, x), torch.float32)


def test_replaced_parameter() -> None:
    ours, theirs = pair(input_size=5, hidden_size=7)
    w = torch.nn.Parameter(torch.randn(28, 7))
    for module in (ours, theirs):
        module.weight_hh_l0 = w
    x = torch.randn(6, 4, 5)
    assert_near(everything(ours, x), everything(theirs, x), torch.float32)


def test_weight_norm() -> None:
    ours, theirs = pair(input_size=5, hidden_size=7, num_layers=2)
    for module in (ours, theirs):
        for name in ("weight_hh_l0", "weight_ih_l1"):
            torch.nn.utils.parametrizations.weight_norm(module, name)
    x = torch.randn(6, 4, 5)
    for _ in range(2):
        assert_near(everything(ours, x), everything(theirs, x), torch.float32)
        for module in (ours, theirs):
            with torch.no_grad():
                for p in module.parameters():
                    p.mul_(1.1)


def test_functional_call() -> None:
    ours, theirs = pair(input_size=5, hidden_size=7, num_layers=2)
    x = torch.randn(6, 4, 5)
    weights = {n: torch.randn_like(p, requires_grad=True) for n, p in ours.named_parameters()}
    results = []
    for module in (ours, theirs):
        y, _ = torch.func.functional_call(module, weights, (x,))
        results.append([y.detach(), *torch.autograd.grad(y.sum(), list(weights.values()))])
    assert_near(*[dict(enumerate(r)) for r in results], torch.float32)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])


def test_grad_through_torch_func() -> None:
    ours, theirs = pair(input_size=5, hidden_size=7)
    x = torch.randn(6, 4, 5)
    grads = []
    for module in (ours, theirs):
        weights = dict(module.named_parameters())
        grads.append(
            torch.func.grad(lambda w, m=module: torch.func.functional_call(m, w, (x,))[0].square().sum())(weights)
        )
    torch.testing.assert_close(*grads)


def test_module_conversion_of_dtype() -> None:
    ours, _ = pair(input_size=5, hidden_size=7)
    copied = copy.deepcopy(ours)
    x = torch.randn(6, 4, 5)
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
        y, (h_n, c_n) = ours.to(dtype)(x.to(dtype))
        assert y.dtype == h_n.dtype == c_n.dtype == dtype
        torch.testing.assert_close(y.float(), copied(x)[0], rtol=2e-2, atol=2e-2)
    assert ours.share_memory() is ours and torch.equal(ours(x)[0], ours(x)[0])


def test_module_on_meta_device() -> None:
    with torch.device("meta"):
        module = LSTM(5, 7)
    assert module.weight_ih_l0.is_meta
    module = module.to_empty(device="cpu")
    ours, theirs = pair(input_size=5, hidden_size=7)
    module.load_state_dict(theirs.state_dict())
    x = torch.randn(6, 4, 5)
    assert torch.equal(module(x)[0], ours(x)[0])


def test_hooks_and_double_backward_through_a_training_loop() -> None:
    """A gradient penalty, as for the critic of a GAN."""
    ours, theirs = pair(input_size=5, hidden_size=7, dtype=torch.float64)
    seen, x = [], torch.randn(6, 4, 5, dtype=torch.float64, requires_grad=True)
    ours.register_forward_hook(lambda m, args, out: seen.append(out[0].shape))
    for module in (ours, theirs):
        y, _ = module(x)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (dx.norm() - 1).square().backward()
    assert seen == [(6, 4, 7)]
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_inference_mode() -> None:
    ours, theirs = pair(input_size=5, hidden_size=7)
    with torch.inference_mode():
        x = torch.randn(6, 4, 5)
        y, hx = ours(x)
        assert y.is_inference()
        torch.testing.assert_close((y, hx), theirs(x))
        torch.testing.assert_close(ours(x, hx), theirs(x, hx))


def test_subclass_with_another_forward() -> None:
    class Last(LSTM):
        def forward(self, x):
            return super().forward(x)[1][0][-1]

    torch.manual_seed(0)
    last = Last(5, 7)
    ours, _ = pair(input_size=5, hidden_size=7)
    x = torch.randn(6, 4, 5)
    assert torch.equal(last(x), ours(x)[1][0][-1])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("P", [0, 20])
def test_long_ragged_training_step(bias: bool, P: int) -> None:
    """A realistic size in float32, with all gradients."""
    case = Case(
        B=12, T=60, D=40, H=64, L=2, P=P, bias=bias, bidirectional=True, packed=True,
        lengths=ragged(12, 60, ordered=True), why="a text classifier",
    )  # fmt: skip
    inputs = make_inputs(case, torch.float32)
    got, want = (run_module(module_of(cls, inputs), inputs) for cls in (LSTM, torch.nn.LSTM))
    assert_near(got, want, torch.float32)


def test_combinations_of_options() -> None:
    """All combinations of constructor options, with and without a state."""
    x = torch.randn(3, 4, 5)
    choices = itertools.product([1, 2], [True, False], [True, False], [True, False], [0, 2], [True, False])
    for L, bias, batch_first, bidirectional, P, state in choices:
        ours, theirs = pair(
            input_size=5,
            hidden_size=6,
            num_layers=L,
            bias=bias,
            batch_first=batch_first,
            bidirectional=bidirectional,
            proj_size=P,
        )
        states, B = L * (1 + bidirectional), 3 if batch_first else 4
        hx = (torch.randn(states, B, P or 6), torch.randn(states, B, 6))
        call = (x, hx) if state else (x,)
        assert_near(everything(ours, *call), everything(theirs, *call), torch.float32)
