"""Functions shared by the operators: op handles, gradients of reference definitions, vmap rule, autocast, TF32."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from .. import _C  # the import registers the ops

Function = Callable[..., Any]

NAMESPACE: str = _C.namespace  # of the ops: torch.ops.seqkernels


def op(name: str, namespace: str = NAMESPACE) -> Function:
    """The `.default` overload of an op. Calling it takes half the time of calling the overload packet."""
    overload: Function = getattr(getattr(torch.ops, namespace), name).default
    return overload


def register_fake(name: str, fake: Function) -> None:
    """Registers the fake implementation of an op, which raises TypeError for None in place of a required tensor.

    The dispatcher accepts None for each argument of type Tensor. The C++ implementations check it too.
    """
    schema = op(*reversed(name.split("::")))._schema  # type: ignore[attr-defined]
    required = [(i, a.name) for i, a in enumerate(schema.arguments) if isinstance(a.type, torch.TensorType)]

    @functools.wraps(fake)
    def checked(*arguments: Any, **keywords: Any) -> Any:
        for i, argument in required:
            if i < len(arguments) and arguments[i] is None:
                raise TypeError(f"{schema.name.split('::')[1]}: {argument} must be a Tensor, got None")
        return fake(*arguments, **keywords)

    torch.library.register_fake(name)(checked)


# ---- differentiation

below_autograd = torch._C._AutoDispatchBelowAutograd


def recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call with these inputs."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def eager_function(name: str, forward: Function, setup_context: Function, backward: Function) -> Function:
    """A function of the formula of `register_autograd` for plain eager mode, see `eager_on_cpu`.

    Calls with gradients through the dispatcher, which runs formulas written in Python, take 30 us longer.

    Args:
        name: of the function, for the names of its nodes.
        forward: computes the outputs, with grad mode off.
        setup_context, backward: as in torch.library.register_autograd.
    """

    def run(ctx: Any, *inputs: Any) -> Any:
        with below_autograd():
            output = forward(*inputs)
        setup_context(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(run), "backward": staticmethod(backward)}
    apply: Function = type(name, (torch.autograd.Function,), methods).apply  # type: ignore[attr-defined]
    return apply


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is active. torch.compile traces both through the ops."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def unchanged(output: Tensor) -> Tensor:
    """An output to save for backward, whose values in-place operations of the user do not change.

    On a CPU, where torch's layers support such operations, the result shares the memory of the output until one of them
    is written (copy on write). Reading through a pointer, as Triton does, would also copy.
    """
    if type(output) is Tensor and output.is_cpu:
        return torch._lazy_clone(output)
    return output


_legacy_batched = torch._C._functorch.is_legacy_batchedtensor


def needs_definition(grads: Sequence[Tensor | None]) -> bool:
    """Whether the backward pass uses the reference definition instead of the kernels.

    With create_graph, the gradients are differentiated again, but the kernels support only the first order. With
    is_grads_batched, the gradients are batched tensors, which the kernels do not support.
    """
    return torch.is_grad_enabled() or any(g is not None and _legacy_batched(g) for g in grads)


def replaced(values: Sequence[Any], at: Sequence[int], by: Sequence[Any]) -> list[Any]:
    """Copy of `values` in which by[i] replaces the value at position at[i]."""
    values = list(values)
    for i, value in zip(at, by):
        values[i] = value
    return values


def vjp_by_definition(
    function: Function,
    primals: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Vector-Jacobian product of a reference definition, differentiable to any order and in any transform.

    Args:
        function: maps the primals to a tensor or a tuple of tensors.
        grads: upstream gradient of each output; None is a zero gradient.
        needs: for each primal, whether its gradient is required.
    Returns:
        A gradient for each primal, None where it is not required.
    """
    wanted = [i for i, need in enumerate(needs) if need and primals[i] is not None]
    given = [i for i, grad in enumerate(grads) if grad is not None]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if given and wanted:

        def outputs_of(*moving: Tensor) -> tuple[Tensor, ...]:
            outputs = _as_tuple(function(*replaced(primals, wanted, moving)))
            return tuple(outputs[i] for i in given)

        _, pull, *_ = torch.func.vjp(outputs_of, *(primals[i] for i in wanted))
        found = pull(tuple(grads[i] for i in given))
    return replaced([None] * len(needs), wanted, found)


def jvp_by_definition(
    function: Function, primals: Sequence[Tensor | None], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Jacobian-vector product of a reference definition: the tangents of its outputs.

    The vector-Jacobian product is linear in its vector, and its transpose is the Jacobian-vector product.
    """
    moving = [i for i, tangent in enumerate(tangents) if tangent is not None]

    def outputs_of(*values: Tensor) -> tuple[Tensor, ...]:
        return _as_tuple(function(*replaced(primals, moving, values)))

    outputs, pull, *_ = torch.func.vjp(outputs_of, *(primals[i] for i in moving))
    _, push, *_ = torch.func.vjp(pull, tuple(torch.zeros_like(output) for output in outputs))
    result: tuple[Tensor, ...] = push(tuple(tangents[i] for i in moving))[0]
    return result


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def vmap_rule(op: Function) -> Function:
    """vmap rule that calls the op once per sample, so that samples may have separate weights and weight gradients."""

    def one(value: Any, dim: Any, i: int) -> Any:
        if isinstance(value, (list, tuple)):
            dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(value)
            return [one(v, d, i) for v, d in zip(value, dims)]
        return value if dim is None else value.select(dim, i).contiguous()

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        results = [op(*(one(a, d, i) for a, d in zip(args, in_dims))) for i in range(info.batch_size)]
        flat = [pytree.tree_flatten(result)[0] for result in results]
        spec = pytree.tree_flatten(results[0])[1]
        stacked = pytree.tree_unflatten([torch.stack(column) for column in zip(*flat)], spec)
        return stacked, pytree.tree_map(lambda _: 0, stacked)

    return rule


# ---- autocast


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype to which autocast casts inputs of matrix products on `device`, or None if autocast is disabled."""
    kind = device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def autocast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts t to the dtype of autocast. Integer and float64 tensors are returned unchanged."""
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


# ---- TF32

_SET_TF32 = getattr(_C, "set_tf32", None)  # None in builds without CUDA kernels


def follow_tf32(x: Tensor, setting: Any) -> None:
    """Enables TF32 in the float32 matrix products of the CUDA kernels if torch enables it.

    Args:
        setting: the module of torch.backends with the `fp32_precision` of the operator. Compiled graphs use the value
            of the last eager call.
    """
    if _SET_TF32 is not None and x.is_cuda and x.dtype == torch.float32 and not torch.compiler.is_compiling():
        _SET_TF32(allows_tf32(setting))


def allows_tf32(setting: Any) -> bool:
    """Whether a module of torch.backends allows TF32."""
    allowed: bool = setting.fp32_precision == "tf32"
    return allowed
