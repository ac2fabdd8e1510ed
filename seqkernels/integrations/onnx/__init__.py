"""Export to ONNX: translations of the ops of seqkernels for torch.onnx.export.

    import seqkernels.integrations.onnx
    seqkernels.integrations.onnx.export(model.eval(), (x,), "model.onnx", dynamic_shapes=({0: "T", 1: "B"},))

docs/onnx.md has the nodes of each layer, and what raises. Requires onnx and onnxscript.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ...functional._autograd import op
from ...functional._recurrent_kinds import KINDS

try:
    import onnx  # noqa: F401
    import onnx_ir as ir
    import onnx_ir.passes.common as passes
    import onnxscript.optimizer
except ImportError as error:
    raise ImportError(
        f"seqkernels.integrations.onnx requires onnx and onnxscript: pip install onnx onnxscript; got {error}"
    ) from error

from . import _attention, _embedding_bag, _recurrent
from ._graph import Graph

__all__ = ["export", "translation_table"]

# Ops without a translation -> the reason, and what to do.
_UNSUPPORTED = {
    "crf_forward": "CRF: the log likelihood has no ONNX form; export the emissions",
    "crf_viterbi": "CRF: decoding has no ONNX form; export the emissions",
    "ctc_loss_forward": "CTCLoss: the loss has no ONNX form; export the log probabilities",
    "embedding_bag_bytes": "QuantizedEmbeddingBag: tables of bytes have no ONNX form; export the EmbeddingBag",
    "embedding_bag_pack_bytes": "quantize_rows: tables of bytes have no ONNX form; export the EmbeddingBag",
    "embedding_bag_renorm_": "embedding_bag: max_norm must be None in ONNX, which does not write into tables",
    "packed_sequences": "variational_dropout must draw no mask in ONNX, got one of training; call model.eval()",
}


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations of the ops of seqkernels, for torch.onnx.export.

    torch.onnx.export(model, args, dynamo=True, custom_translation_table=translation_table())

    Returns:
        Op -> function that adds nodes to the graph. It raises NotImplementedError for options that the nodes cannot
        compute, with the name of the option; torch.onnx.export reports it as the cause of a ConversionError.
    """
    functions: dict[str, Callable[..., Any]] = {
        "attention_forward": _attention.attention,
        "attention_weights": _attention.attention_weights,
        "additive_attention_forward": _attention.additive_attention,
        "additive_attention_key_exp": _attention.additive_attention_key_exp,
        "embedding_bag": _embedding_bag.embedding_bag,
        "embedding_bag_forward": _embedding_bag.embedding_bag_forward,
        "embedding_bags": _embedding_bag.embedding_bags,
        "embedding_bags_forward": _embedding_bag.embedding_bags_forward,
    }
    for kind in KINDS:
        functions[kind] = functools.partial(_recurrent.translate, kind, False)
        functions[f"{kind}_forward"] = functools.partial(_recurrent.translate, kind, True)
    functions |= {name: functools.partial(_refuse, why) for name, why in _UNSUPPORTED.items()}
    return {op(name): _translation(op(name), function) for name, function in functions.items()}


def export(
    model: torch.nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] = (),
    f: str | os.PathLike[str] | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    verbose: bool | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset_version: int = 23,
    dynamic_shapes: dict[str, Any] | tuple[Any, ...] | list[Any] | None = None,
    custom_translation_table: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
    external_data: bool = True,
    report: bool = False,
    optimize: bool = True,
    verify: bool = False,
    artifacts_dir: str | os.PathLike[str] = ".",
) -> torch.onnx.ONNXProgram:
    """torch.onnx.export of a model with layers of seqkernels, without gradients.

    Args:
        model: in evaluation mode: masks of dropout and zoneout raise.
        f: path of the file; None: not saved.
        opset_version: from 23, attention is the operator Attention, before MatMul and Softmax.
        dynamic_shapes: as in torch.export.export; sizes that are not named there are constants of the graph.
        custom_translation_table: further translations, which replace those of `translation_table`.
        optimize: whether to fold constants and remove unused nodes. Weights are then initializers in the order of ONNX.
        Others: as in torch.onnx.export.
    Returns:
        A torch.onnx.ONNXProgram.
    Raises:
        NotImplementedError: a layer or an option that ONNX cannot compute; the message names it.
        torch.onnx.errors.OnnxExporterError: as torch.onnx.export.
    Equivalent to: torch.onnx.export(dynamo=True) with `translation_table`.
    Deterministic: yes.
    Source: https://onnx.ai/onnx/operators; https://docs.pytorch.org/docs/stable/onnx_export.html
    """
    table = {**translation_table(), **(custom_translation_table or {})}
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                model,
                args,
                kwargs=kwargs,
                dynamo=True,
                verbose=verbose,
                input_names=input_names,
                output_names=output_names,
                opset_version=opset_version,
                dynamic_shapes=dynamic_shapes,
                custom_translation_table=table,
                report=report,
                optimize=optimize,
                verify=verify,
                artifacts_dir=artifacts_dir,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = _refusal(error)
        if reason is None:
            raise
        raise NotImplementedError(reason) from error
    assert program is not None  # None only with dynamo=False
    if optimize:
        _fold_weights(program)
    if f is not None:
        program.save(f, external_data=external_data)
    return program


def _translation(overload: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """A translation with the arguments of an op, of a function with the graph and the arguments by name."""
    arguments = overload._schema.arguments
    names = [argument.name for argument in arguments]
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}

    def translate(*args: Any, **kwargs: Any) -> Any:
        graph = Graph()
        found = function(graph, {**defaults, **dict(zip(names, args)), **kwargs})
        return tuple(map(graph.result, found)) if isinstance(found, tuple) else graph.result(found)

    translate.__name__ = translate.__qualname__ = overload._schema.name.replace("::", "_")
    return translate


def _refuse(why: str, graph: Graph, arguments: dict[str, Any]) -> Any:
    raise NotImplementedError(why)


def _refusal(error: BaseException | None) -> str | None:
    """The reason of a refusal that caused an error of the exporter."""
    while error is not None:
        if isinstance(error, NotImplementedError):
            return str(error)
        for name, why in _UNSUPPORTED.items():  # of ops that write into an argument, torch calls no translation
            if f"seqkernels.{name}.default" in str(error):
                return why
        error = error.__cause__
    return None


def _fold_weights(program: torch.onnx.ONNXProgram) -> None:
    """Replaces nodes of the translations that arrange weights by initializers.

    The optimizer of torch.onnx.export folds small weights only.
    """

    def arranges(node: Any) -> bool:
        return "seqkernels" in node.meta and node.op_type in _ARRANGE

    onnxscript.optimizer.fold_constants(program.model, should_fold=arranges, output_size_limit=1 << 40)
    ir.passes.Sequential(
        passes.LiftConstantsToInitializersPass(lift_all_constants=False),
        passes.RemoveUnusedNodesPass(),
    )(program.model)


_ARRANGE = {"Concat", "Mul", "Neg", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
