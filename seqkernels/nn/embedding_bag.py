"""Replacements of torch.nn.EmbeddingBag and Embedding, collections of tables, and tables quantized to 8 bits.

Intended differences from torch: those of seqkernels.functional.embedding_bag; the constructor checks the mode; the
options weight_norm and fused_optimizer.

Dimensions: E table rows, D columns, N indices, B bags, T tables, F features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import Module, ModuleDict, Parameter, init

from ..functional import embedding_bag as _embedding_bag
from ..functional import embedding_bag_bytes, quantize_rows
from ..functional._checks import ValueAssertionError, ValueRuntimeError, describe
from ..functional._embedding_bag_sharded import is_sharded, rows_here
from ..functional._values import may_read_values, moded
from ..functional.embedding_bag import bag, bags, check_options, of_nested, plain_rows, rows
from ._symbolic import as_leaf, qconfig, refuse_scripting
from .fused_optimizer import (
    FusedOptimizer,
    FusedState,
    check_data_parallel,
    check_optimizer,
    step_one,
    step_several,
)

Device = torch.device | str | int | None


class _Table(Module):
    """A table [E, D] and its state of a fused optimiser."""

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    weight: Tensor
    fused_optimizer: FusedOptimizer | None = None  # also of pickles of torch's modules, for which ours stand in
    fused_state: FusedState
    max_norm: float | None = None
    sparse = False
    _gathered = False  # whether fully_shard gathers the table for each call
    __prepare_scriptable__ = refuse_scripting
    qconfig = qconfig

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and is_sharded(self._parameters.get("weight")):
            self._gathered = True
        super().__setattr__(name, value)

    @property
    def _caller(self) -> str:
        """Name of the module in error messages."""
        return type(self).__name__

    def _make(
        self,
        padding_idx: int | None,
        weight: Tensor | None,
        freeze: bool,
        fused_optimizer: FusedOptimizer | None,
        sparse: bool,
        device: Any,
        dtype: Any,
    ) -> None:
        caller, E, D = self._caller, self.num_embeddings, self.embedding_dim
        _check_sizes(caller, E, D)
        if padding_idx is not None:
            if not -E <= padding_idx < E:
                raise ValueAssertionError(
                    f"{caller}: padding_idx must be within num_embeddings, [-{E}, {E}), got {padding_idx}"
                )
            padding_idx += E if padding_idx < 0 else 0
        self.padding_idx = padding_idx
        check_optimizer(caller, fused_optimizer, sparse)
        shape = E, D
        if weight is not None and tuple(weight.shape) != shape:
            wanted = f"[num_embeddings, embedding_dim] = [{E}, {D}]"
            raise ValueAssertionError(f"{caller}: _weight must have shape {wanted}, got {list(weight.shape)}")
        fresh = weight is None
        weight = self._empty(device, dtype) if weight is None else weight
        self.weight = Parameter(weight, requires_grad=not freeze)
        self.fused_optimizer = fused_optimizer
        if fused_optimizer is not None:
            self.fused_state = FusedState(fused_optimizer, weight)
        if fresh:
            self.reset_parameters()

    def _empty(self, device: Any, dtype: torch.dtype | None) -> Tensor:
        """An uninitialized table [E, D]."""
        return torch.empty(self.num_embeddings, self.embedding_dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        init.normal_(self.weight)
        self._fill_padding_idx_with_zero()
        if self.fused_optimizer is not None:
            self.fused_state.reset()

    def _fill_padding_idx_with_zero(self) -> None:
        if self.padding_idx is None:
            return
        with torch.no_grad():
            weight: Any = self.weight
            row = self.padding_idx
            if is_sharded(weight):  # row `padding_idx` of a DTensor may be a copy
                first, rows = rows_here(weight)
                if not first <= row < first + rows:
                    return
                weight, row = weight.to_local(), row - first
            weight[row].fill_(0)

    def _table(self) -> Tensor:
        if self._gathered:
            self._check_gathered()
        weight = self._parameters.get("weight")  # None if a parametrization computes it
        return self.weight if weight is None else weight

    def _check_gathered(self) -> None:
        """Raises for options that fully_shard breaks."""
        instead = "list the table in ignored_params, or shard it with distribute_module"
        for option, wrong, why in (
            ("fused_optimizer must be None", self.fused_optimizer is not None, "discards writes into the table"),
            ("max_norm must be None", self.max_norm is not None, "discards writes into the table"),
            ("sparse must be False", self.sparse, "does not reduce sparse gradients"),
        ):
            if wrong:
                raise NotImplementedError(f"{type(self).__name__}: {option} with fully_shard, which {why}; {instead}")

    def _step(self, table: Tensor) -> Callable[..., None] | None:
        """The optimiser step that replaces the gradient of the table in backward, or None."""
        optimizer = self.fused_optimizer
        if optimizer is None or not (torch.is_grad_enabled() and table.requires_grad):
            return None
        if not table.is_leaf:
            raise ValueError(
                f"{self._caller}: weight must be a leaf parameter with fused_optimizer, got the result of an operation"
            )
        check_data_parallel(type(self).__name__, table)
        state = self.fused_state
        state.follow(type(self).__name__, table)

        def step(tables: Sequence[Tensor], *rest: Any) -> None:
            step_one(optimizer, state, tables[0], *rest)

        return step


def _check_sizes(caller: str, num_embeddings: int, embedding_dim: int, least: int = 0) -> None:
    for name, size, at_least in (("num_embeddings", num_embeddings, 0), ("embedding_dim", embedding_dim, least)):
        if size < at_least:
            raise ValueRuntimeError(f"{caller}: {name} must be at least {at_least}, got {size}")


class EmbeddingBag(_Table, torch.nn.EmbeddingBag):
    """Drop-in replacement for torch.nn.EmbeddingBag: same constructor, parameters, initialization and state_dict.

    Args: as torch.nn.EmbeddingBag: num_embeddings, embedding_dim, max_norm=None, norm_type=2.0,
        scale_grad_by_freq=False, mode="mean" (sum, mean, max or min), sparse=False, _weight=None,
        include_last_offset=False, padding_idx=None, device=None, dtype=None.
    Keyword-only options:
        weight_norm: divisor of a weighted mean: "count", the number of rows, or "weight", the sum of the weights.
        fused_optimizer: a seqkernels.nn.FusedSGD, FusedAdagrad, FusedRowwiseAdagrad or FusedAdam. Backward then updates
            the rows that occur, and weight.grad remains None. The state of the optimiser is in `fused_state` and in
            the state_dict. Its hyperparameters, such as lr, can be set between steps and are not in the state_dict.
            Each forward call allows one backward pass, whose step uses the gradient of the loss as it is scaled.
            create_graph, torch.func and graphs of torch.compile are not supported.
    Inputs: input, offsets=None, per_sample_weights=None: as seqkernels.functional.embedding_bag.
    Outputs: [B, D], dtype of weight.
    Raises: ValueError, TypeError; in forward as seqkernels.functional.embedding_bag.
    Deterministic: yes; the same bits for any number of threads.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.EmbeddingBag.html
    """

    __constants__ = [  # noqa: RUF012  (as torch's)
        *("num_embeddings", "embedding_dim", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse"),
        *("include_last_offset", "padding_idx", "weight_norm"),
    ]
    weight_norm: str = "count"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        _weight: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        weight_norm: str = "count",
        fused_optimizer: FusedOptimizer | None = None,
    ) -> None:
        Module.__init__(self)  # torch.nn.EmbeddingBag's would create a table of its own
        check_options(type(self).__name__, mode, weight_norm)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.scale_grad_by_freq = scale_grad_by_freq
        self.mode = mode
        self.sparse = sparse
        self.include_last_offset = include_last_offset
        self.weight_norm = weight_norm
        self._make(padding_idx, _weight, False, fused_optimizer, sparse, device, dtype)

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        if type(input) is not Tensor and isinstance(input, Proxy):
            arguments = dict(input=input, offsets=offsets, per_sample_weights=per_sample_weights)
            return as_leaf(self, arguments)
        table = self._table()
        if self.fused_optimizer is None:
            return _embedding_bag(
                input, table, offsets, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.mode, self.sparse,
                per_sample_weights, self.include_last_offset, self.padding_idx, weight_norm=self.weight_norm,
            )  # fmt: skip
        return bag(
            input, table, offsets, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.mode, False,
            per_sample_weights, self.include_last_offset, self.padding_idx, self.weight_norm, self._step(table),
        )  # fmt: skip

    def extra_repr(self) -> str:
        return _shown(
            f"{self.num_embeddings}, {self.embedding_dim}",
            max_norm=(self.max_norm, None),
            norm_type=(self.norm_type, 2),
            scale_grad_by_freq=(self.scale_grad_by_freq, False),
            mode=(self.mode, ""),
            padding_idx=(self.padding_idx, None),
            weight_norm=(self.weight_norm, "count"),
            fused_optimizer=(self.fused_optimizer, None),
        )

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        *,
        weight_norm: str = "count",
        fused_optimizer: FusedOptimizer | None = None,
    ) -> EmbeddingBag:
        """Creates a module with the table embeddings [E, D], without a copy. `freeze` disables its gradient."""
        _check_pretrained(cls.__name__, embeddings)
        E, D = embeddings.shape
        made = cls(
            E, D, max_norm, norm_type, scale_grad_by_freq, mode, sparse, embeddings, include_last_offset,
            padding_idx, weight_norm=weight_norm, fused_optimizer=fused_optimizer,
        )  # fmt: skip
        made.weight.requires_grad = not freeze
        return made


class Embedding(_Table, torch.nn.Embedding):
    """Drop-in replacement for torch.nn.Embedding: same constructor, parameters, initialization and state_dict.

    Args: as torch.nn.Embedding: num_embeddings, embedding_dim, padding_idx=None, max_norm=None, norm_type=2.0,
        scale_grad_by_freq=False, sparse=False, _weight=None, _freeze=False, device=None, dtype=None.
    Keyword-only options: fused_optimizer, as in EmbeddingBag.
    Inputs: input [*], as seqkernels.functional.embedding.
    Outputs: [*, D], dtype of weight.
    Raises: ValueError, TypeError; in forward as seqkernels.functional.embedding.
    Deterministic: yes; the same bits for any number of threads.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Embedding.html
    """

    __constants__ = [  # noqa: RUF012  (as torch's)
        *("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    ]

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        fused_optimizer: FusedOptimizer | None = None,
    ) -> None:
        Module.__init__(self)  # torch.nn.Embedding's would create a table of its own
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.scale_grad_by_freq = scale_grad_by_freq
        self.sparse = sparse
        self._make(padding_idx, _weight, _freeze, fused_optimizer, sparse, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and isinstance(input, Proxy):
            return as_leaf(self, dict(input=input))
        weight = self._parameters.get("weight")
        usual = self.fused_optimizer is None and self.max_norm is None and not self._gathered
        if usual and type(weight) is Parameter and type(input) is Tensor and not moded():
            found = plain_rows(input, weight, self.padding_idx, self.scale_grad_by_freq, self.sparse)
            if found is not None:
                return found
        table = self._table()
        step = None if self.fused_optimizer is None else self._step(table)
        return rows(
            input, table, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse, step
        )

    def extra_repr(self) -> str:
        return _shown(
            f"{self.num_embeddings}, {self.embedding_dim}",
            padding_idx=(self.padding_idx, None),
            max_norm=(self.max_norm, None),
            norm_type=(self.norm_type, 2),
            scale_grad_by_freq=(self.scale_grad_by_freq, False),
            sparse=(self.sparse, False),
            fused_optimizer=(self.fused_optimizer, None),
        )

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        fused_optimizer: FusedOptimizer | None = None,
    ) -> Embedding:
        """Creates a module with the table embeddings [E, D], without a copy. `freeze` disables its gradient."""
        _check_pretrained(cls.__name__, embeddings)
        E, D = embeddings.shape
        return cls(
            E, D, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, embeddings, freeze,
            fused_optimizer=fused_optimizer,
        )  # fmt: skip


def _shown(text: str, **values: tuple[Any, Any]) -> str:
    """Text of extra_repr; `values` holds (value, default) pairs and skips those with the default."""
    return "".join([text, *(f", {name}={value!r}" for name, (value, usual) in values.items() if value != usual)])


def _check_pretrained(caller: str, embeddings: Any) -> None:
    if not isinstance(embeddings, Tensor) or embeddings.dim() != 2:
        raise ValueAssertionError(f"{caller}: embeddings must be a tensor of 2 dimensions, got {describe(embeddings)}")


# ---- collections of tables

Feature = Tensor | tuple[Tensor, ...]  # indices, [B, L] or jagged; or (indices [N], offsets [B][, weights [N]])


@dataclass(frozen=True)
class EmbeddingBagConfig:
    """A table of a collection.

    Args:
        num_embeddings, embedding_dim: E and D.
        features: names of the features of the table; unique in a collection.
        name: name of the table in the state_dict; by default, the name of the first feature.
    """

    num_embeddings: int
    embedding_dim: int
    features: Sequence[str]
    name: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.features, str) or not self.features:
            raise ValueError(f"EmbeddingBagConfig: features must be a list of names, got {self.features!r}")
        object.__setattr__(self, "features", tuple(self.features))
        object.__setattr__(self, "name", self.name or self.features[0])


class EmbeddingBagCollection(Module):
    """Tables of different sizes with one or more features each, looked up in one call.

    Args:
        tables: an EmbeddingBagConfig for each table.
        mode: sum, mean, max or min.
        device, dtype: of all tables.
    Keyword-only options: weight_norm, scale_grad_by_freq, sparse, fused_optimizer: as in EmbeddingBag. One step of
        fused_optimizer updates all tables.
    Inputs: one of
        - input [N] and offsets [F * B + 1]: the bags of each feature in the order of `features`; per_sample_weights
          [N].
        - a dict from each feature to its bags: indices [B, L], a jagged nested tensor, (indices [N_f], offsets [B]) or
          (indices, offsets, weights [N_f]). If only some features have weights, the weights of the others are 1.
    Outputs: [B, sum of the features' D], in the order of `features`; `split` returns a dict.
    Raises: ValueError, TypeError, RuntimeError: as seqkernels.functional.embedding_bags.
    Deterministic: yes; the same bits for any number of threads, and as with one EmbeddingBag per feature.

    The parameters are embedding_bags.<name>.weight, as in torchrec.EmbeddingBagCollection.
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        mode: str = "sum",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        weight_norm: str = "count",
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        fused_optimizer: FusedOptimizer | None = None,
    ) -> None:
        super().__init__()
        caller = type(self).__name__
        check_options(caller, mode, weight_norm)
        tables = list(tables)
        if not tables:
            raise ValueError(f"{caller}: tables must hold at least one EmbeddingBagConfig, got none")
        for table in tables:
            if not isinstance(table, EmbeddingBagConfig):
                raise TypeError(f"{caller}: tables must hold EmbeddingBagConfig, got {type(table).__name__}")
        for what, given in (("names", [t.name for t in tables]), ("features", [f for t in tables for f in t.features])):
            if len(set(given)) != len(given):
                raise ValueError(f"{caller}: {what} must differ from table to table, got {', '.join(given)}")
        check_optimizer(caller, fused_optimizer, sparse)
        self.tables = tuple(tables)
        self.mode = mode
        self.weight_norm = weight_norm
        self.scale_grad_by_freq = scale_grad_by_freq
        self.sparse = sparse
        self.fused_optimizer = fused_optimizer
        self.features = tuple(f for t in tables for f in t.features)
        self.dims = tuple(t.embedding_dim for t in tables for _ in t.features)
        self._counts = tuple(len(t.features) for t in tables)
        self.embedding_bags = ModuleDict(
            {t.name: _TableOfCollection(t, fused_optimizer, device, dtype) for t in tables}
        )

    def reset_parameters(self) -> None:
        for table in self._tables():
            table.reset_parameters()

    def _tables(self) -> list[_TableOfCollection]:
        return list(self.embedding_bags._modules.values())  # type: ignore[arg-type]

    def forward(
        self,
        input: Tensor | Mapping[str, Feature],
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        if isinstance(input, Mapping):
            if offsets is not None or per_sample_weights is not None:
                raise ValueError(
                    f"{type(self).__name__}: offsets and per_sample_weights must be part of the dict of features, "
                    "got separate ones"
                )
            input, offsets, per_sample_weights = self._side_by_side(input)
        elif offsets is None:
            raise ValueError(f"{type(self).__name__}: offsets must be given where input is a tensor, got None")
        owners = self._tables()
        tables, step = [owner._table() for owner in owners], None
        optimizer = self.fused_optimizer
        if optimizer is not None and any(list(map(_Table._step, owners, tables))):
            states = [owner.fused_state for owner in owners]
            step = functools.partial(step_several, optimizer, states, self._counts)
        return bags(
            input, tables, offsets, self._counts, self.mode, per_sample_weights, self.scale_grad_by_freq, self.sparse,
            self.weight_norm, step,
        )  # fmt: skip

    def split(self, output: Tensor) -> dict[str, Tensor]:
        """Splits the output of forward into views [B, D], by feature."""
        return dict(zip(self.features, output.split(self.dims, dim=1)))

    def _side_by_side(self, features: Mapping[str, Feature]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Concatenates the features to input [N], offsets [F * B + 1] and weights [N] or None."""
        caller = type(self).__name__
        if set(features) != set(self.features):
            raise ValueError(
                f"{caller}: input must hold the features {', '.join(self.features)}, got "
                f"{', '.join(map(str, features))}"
            )
        each = [_bags_of(f"{caller}: feature {name!r}", features[name]) for name in self.features]
        B, before, offsets = each[0][1].shape[0], 0, []
        for name, (indices, starts, _) in zip(self.features, each):
            if starts.shape[0] != B:
                raise ValueError(f"{caller}: feature {name!r} must have {B} bags like the first, got {starts.shape[0]}")
            offsets.append(starts + before)
            before = before + indices.shape[0]
        offsets.append(offsets[0].new_full((1,), before))
        weights = None
        if any(w is not None for _, _, w in each):
            like = next(w for _, _, w in each if w is not None)
            weights = torch.cat([like.new_ones(i.shape[0]) if w is None else w for i, _, w in each])
        return torch.cat([indices for indices, _, _ in each]), torch.cat(offsets), weights

    def extra_repr(self) -> str:
        return _shown(
            f"mode={self.mode!r}",
            weight_norm=(self.weight_norm, "count"),
            scale_grad_by_freq=(self.scale_grad_by_freq, False),
            sparse=(self.sparse, False),
            fused_optimizer=(self.fused_optimizer, None),
        )


class _TableOfCollection(_Table):
    def __init__(self, config: EmbeddingBagConfig, fused_optimizer: Any, device: Any, dtype: Any) -> None:
        super().__init__()
        self.num_embeddings = config.num_embeddings
        self.embedding_dim = config.embedding_dim
        self.features = config.features
        self._make(None, None, False, fused_optimizer, False, device, dtype)

    @property
    def _caller(self) -> str:
        return "EmbeddingBagCollection"

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, features={', '.join(self.features)}"


def _bags_of(caller: str, given: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Indices [N], int64 offsets [B] and weights [N] of a feature."""
    if isinstance(given, Tensor):
        if given.is_nested:
            indices, offsets, _ = of_nested(caller, given, None, None)
            assert offsets is not None
            return indices, offsets[:-1], None
        if given.dim() != 2:
            raise ValueError(f"{caller} must be [B, L], or (indices, offsets), got {describe(given)}")
        B, L = given.shape
        return given.reshape(-1), torch.arange(B, device=given.device) * L, None
    if not (isinstance(given, tuple) and 2 <= len(given) <= 3 and all(isinstance(t, Tensor) for t in given[:2])):
        raise TypeError(f"{caller} must be [B, L], or (indices, offsets[, weights]), got {describe(given)}")
    indices, offsets, weights = (*given, None)[:3]
    for t in (indices, offsets):
        if t.dim() != 1:
            raise ValueError(f"{caller} must have indices and offsets of 1 dimension, got {describe(t)}")
    if weights is not None and weights.shape != indices.shape:
        raise ValueError(f"{caller} must have weights like indices, {list(indices.shape)}, got {list(weights.shape)}")
    # The op reads the concatenated offsets, in which this check is impossible.
    if offsets.device.type == "cpu" and offsets.numel() and may_read_values(offsets) and int(offsets[0]):
        raise ValueError(f"{caller} must have offsets that begin with 0, got {int(offsets[0])}")
    return indices, offsets.long(), weights


# ---- quantized tables


class QuantizedEmbeddingBag(Module):
    """EmbeddingBag with a table quantized to 8 bits, with a scale and a bias per row. Inference only.

    The table has a quarter of the size of a float32 table. `QuantizedEmbeddingBag.from_float(bag)` converts an
    EmbeddingBag of seqkernels or torch.

    Args: num_embeddings, embedding_dim, mode="mean", include_last_offset=False, padding_idx=None, device=None: as in
        EmbeddingBag.
    Keyword-only options: weight_norm, as in EmbeddingBag.
    Buffers: packed, uint8 [E, D + 8], the result of seqkernels.functional.quantize_rows.
    Inputs: as EmbeddingBag; per_sample_weights float32.
    Outputs: float32 [B, D].
    Deterministic: yes; the same bits for any number of threads.
    """

    packed: Tensor
    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        mode: str = "mean",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: Device = None,
        *,
        weight_norm: str = "count",
    ) -> None:
        super().__init__()
        check_options(type(self).__name__, mode, weight_norm)
        _check_sizes(type(self).__name__, num_embeddings, embedding_dim, 1)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.mode = mode
        self.include_last_offset = include_last_offset
        self.padding_idx = padding_idx
        self.weight_norm = weight_norm
        packed = quantize_rows(torch.zeros(num_embeddings, embedding_dim)).to(device)
        self.register_buffer("packed", packed)

    @classmethod
    def from_float(cls, bag: Any) -> QuantizedEmbeddingBag:
        """Converts an EmbeddingBag: quantizes its table and keeps its options."""
        E, D = bag.num_embeddings, bag.embedding_dim
        made = cls(
            0, D, bag.mode, bag.include_last_offset, bag.padding_idx, weight_norm=getattr(bag, "weight_norm", "count")
        )
        made.num_embeddings, made.packed = E, quantize_rows(bag.weight.detach())
        return made

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        return embedding_bag_bytes(
            input, self.packed, offsets, self.mode, per_sample_weights, self.include_last_offset, self.padding_idx,
            weight_norm=self.weight_norm,
        )  # fmt: skip

    def dequantized(self) -> Tensor:
        """The table as float32 [E, D]."""
        D = self.embedding_dim
        numbers = self.packed[:, D:].contiguous().view(torch.float32)
        return self.packed[:, :D] * numbers[:, :1] + numbers[:, 1:]

    def extra_repr(self) -> str:
        return _shown(
            f"{self.num_embeddings}, {self.embedding_dim}",
            mode=(self.mode, ""),
            padding_idx=(self.padding_idx, None),
            weight_norm=(self.weight_norm, "count"),
        )
