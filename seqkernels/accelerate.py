"""Replaces the modules of a model by those of seqkernels, in place, and back."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from . import backend as backends
from . import nn as sk
from ._tables import aligned
from .inference._modules import family_and_options
from .nn._hooks import overridden

_ORIGINAL = "_seqkernels_original"  # attribute of replaced modules: their class before, and names of added attributes
_SET = {"options", "_kind", "_plain", "_gathered", "fused_state", "forbidden"}  # set by modules of seqkernels
_OF_TABLES = {"max_norm", "sparse", "qconfig"}  # attributes of classes that modules of torch also have


class LSTM(sk.LSTM, nn.LSTM):
    """seqkernels.nn.LSTM as an instance of torch.nn.LSTM."""


class GRU(sk.GRU, nn.GRU):
    """seqkernels.nn.GRU as an instance of torch.nn.GRU."""


class RNN(sk.RNN, nn.RNN):
    """seqkernels.nn.RNN as an instance of torch.nn.RNN."""


_INSTANCES: dict[type[nn.Module], type[nn.Module]] = {nn.LSTM: LSTM, nn.GRU: GRU, nn.RNN: RNN}
_REPLACEMENTS: dict[type[nn.Module], tuple[type[nn.Module], backends.Implementations]] = {
    nn.LSTM: (sk.LSTM, backends.RECURRENT),
    nn.GRU: (sk.GRU, backends.RECURRENT),
    nn.RNN: (sk.RNN, backends.RECURRENT),
    nn.LSTMCell: (sk.LSTMCell, backends.RECURRENT),
    nn.GRUCell: (sk.GRUCell, backends.RECURRENT),
    nn.RNNCell: (sk.RNNCell, backends.RECURRENT),
    nn.Embedding: (sk.Embedding, backends.EMBEDDING_BAG),
    nn.EmbeddingBag: (sk.EmbeddingBag, backends.EMBEDDING_BAG),
    nn.MultiheadAttention: (sk.MultiheadAttention, backends.ATTENTION),
    nn.TransformerEncoderLayer: (sk.TransformerEncoderLayer, backends.ATTENTION),
    nn.TransformerDecoderLayer: (sk.TransformerDecoderLayer, backends.ATTENTION),
}


@dataclass
class Report:
    """What `accelerate` or `restore` did. Printed as a table.

    Attributes:
        replaced: name in the model -> (class before, class now).
        left: name in the model -> (class, reason) of the modules that were left as they are.
        notes: sentences about the replacements.
    """

    replaced: dict[str, tuple[str, str]] = field(default_factory=dict)
    left: dict[str, tuple[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [("module", "class", "replaced by")]
        rows += [(name or "(model)", before, now) for name, (before, now) in self.replaced.items()]
        lines = aligned(rows) if self.replaced else ["Nothing was replaced."]
        lines += [f"left: {name or '(model)'} ({of}): {reason}" for name, (of, reason) in self.left.items()]
        return "\n".join(lines + self.notes)


def accelerate(model: nn.Module, *, keep_isinstance: bool = False) -> Report:
    """Replaces the modules of torch.nn in a model by those of seqkernels, in place.

    Replaced are LSTM, GRU, RNN, their cells, Embedding, EmbeddingBag, MultiheadAttention, TransformerEncoderLayer,
    TransformerDecoderLayer, and torchcrf.CRF of pytorch-crf, at any depth. A replaced module is the same object with
    another class: it keeps its parameters, buffers, hooks, names, training flag, and place in optimizers, and in
    DistributedDataParallel, fully_shard and torch.compile. The state_dict keeps its keys. Subclasses that override
    something are left, as is what no kernel of seqkernels runs.

    Call it before or after `model.to(device)`; a module that is moved later to a device without a kernel for it raises
    NotImplementedError in its call.

    Args:
        model: on any device.
        keep_isinstance: keep isinstance(module, torch.nn.LSTM), and of GRU and RNN, true. torch.compile then runs these
            layers in eager mode, and raises with fullgraph=True, as for torch's layers. Replaced modules of the other
            classes of torch.nn are always instances of the original class.
    Returns:
        A Report of what was replaced, and what was left and why.
    Raises:
        TypeError: model is not a torch.nn.Module.
    Equivalent to: the model, within rounding; masks of dropout inside layers and attention differ. The documentation of
        each module lists its intended differences from torch.
    """
    _check("accelerate", model)
    report = Report()
    originals = dict(_REPLACEMENTS)
    torchcrf = sys.modules.get("torchcrf")  # a model with its CRF has imported it
    if torchcrf is not None:
        originals[torchcrf.CRF] = sk.CRF, backends.CRF
    found: list[tuple[str, Any, type[nn.Module]]] = []
    other_form = []
    for name, module in model.named_modules():
        if _ORIGINAL in module.__dict__:
            if isinstance(module, nn.RNNBase) and isinstance(module, tuple(_INSTANCES)) != keep_isinstance:
                other_form.append(name or "(model)")
            continue
        of = next((c for c in type(module).__mro__ if c in originals), None)
        if of is None or isinstance(module, originals[of][0]):
            continue
        reason = _obstacle(module, of, *originals[of])
        if reason:
            report.left[name] = _name(_own_class(type(module))), reason
        else:
            found.append((name, module, of))
    for name, module, of in found:
        ours, before, attributes = originals[of][0], _own_class(type(module)), set(vars(module))
        module.__class__ = _rebased(type(module), of, _INSTANCES.get(of, ours) if keep_isinstance else ours)
        if originals[of][1] is backends.RECURRENT:
            module._set_plain()
        elif ours is sk.CRF:
            module.forbidden = ()
        module.__dict__[_ORIGINAL] = before, tuple(vars(module).keys() - attributes)
        report.replaced[name] = _name(before), _name(ours)
    kept = sorted({of.__name__ for _, _, of in found if keep_isinstance and of in _INSTANCES})
    if kept:
        report.notes.append(
            f"{', '.join(kept)}: instances of the classes of torch.nn, which torch.compile runs in eager mode, "
            "and refuses with fullgraph=True."
        )
    if other_form:
        report.notes.append(
            f"{', '.join(other_form)}: already replaced, with keep_isinstance={not keep_isinstance}; call restore "
            "first to change it."
        )
    return report


def restore(model: nn.Module) -> Report:
    """Undoes `accelerate`: gives the replaced modules of a model their original classes again, in place.

    Modules that were created as modules of seqkernels are left.

    Returns:
        A Report of what was replaced.
    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    _check("restore", model)
    report = Report()
    for name, module in model.named_modules():
        if _ORIGINAL not in module.__dict__:
            continue
        original, added = module.__dict__.pop(_ORIGINAL)
        before = _own_class(type(module))
        module.__class__ = _rebased(type(module), before, original)
        for attribute in added:
            module.__dict__.pop(attribute, None)
        report.replaced[name] = _name(before), _name(original)
    return report


def _check(caller: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")


def _obstacle(
    module: Any, of: type[nn.Module], ours: type[nn.Module], implementations: backends.Implementations
) -> str:
    """Why a module cannot be replaced; empty if it can."""
    added = [c for c in type(module).__mro__ if c not in of.__mro__ and not _is_generated(c)]
    names = [name for c in added for name in overridden(c)]
    if names:
        return f"its class adds or overrides {', '.join(dict.fromkeys(names))}"
    if "forward" in module.__dict__:
        return "its forward method was replaced"
    taken = sorted(vars(module).keys() & (set(dir(ours)) - set(dir(of)) - _OF_TABLES | _SET))
    if taken:
        return f"its attributes {', '.join(taken)} have names of attributes of the replacement"
    if of is nn.Embedding and module.sparse:
        return "sparse=True: torch's kernels are faster"
    layer = None
    if implementations is backends.RECURRENT:
        layer = family_and_options(module)[2], 1, getattr(module, "proj_size", 0) > 0
    tensors = [*module.parameters(), *module.buffers()]
    for device, dtype in {(t.device, t.dtype) for t in tensors if not t.is_meta}:
        reasons = backends.unsupported(implementations, backends.Request(device, dtype, layer))
        if all(reasons.values()):
            of_device = {n: why for n, why in reasons.items() if (n == "cpu") == (device.type == "cpu")}
            if device.type not in ("cpu", "cuda"):
                return f"no kernel runs on {device}"
            return ". ".join(f"{name}: {'; '.join(why)}" for name, why in of_device.items())
    return ""


# ---- classes


def _is_generated(of: type) -> bool:
    """Whether fully_shard, replicate or a parametrization generated the class of a module, or mixes it in."""
    return of.__module__.startswith(("torch.distributed.", "torch.nn.utils."))


def _own_class(of: type) -> type:
    """The class of a module, without the classes that are generated from it."""
    return next(c for c in of.__mro__ if not _is_generated(c))


def _rebased(of: type, old: type, new: type) -> type:
    """`new`, or the class that is generated from it as `of` is from `old`, or from a subclass of `old`."""
    if not _is_generated(of):
        return new
    bases = tuple(_rebased(base, old, new) if issubclass(base, old) else base for base in of.__bases__)
    contents = {name: value for name, value in vars(of).items() if name not in ("__dict__", "__weakref__")}
    return type(of)(of.__name__, bases, contents)


def _name(of: type) -> str:
    """The public name of a class."""
    for package in ("torch.nn", "seqkernels.nn"):
        if of.__module__.startswith((f"{package}.", f"{package.split('.')[0]}.accelerate")):
            return f"{package}.{of.__name__}"
    return f"{of.__module__}.{of.__name__}"
