"""Attention in ONNX: the operator Attention of opset 23, or MatMul and Softmax.

Attention computes a call if opset_version is at least 23 and its arguments have one meaning in all releases of the
operator. It aligns causality with the first key. With softcap, a mask is added before or after the cap, depending on
the release (https://github.com/onnx/onnx/issues/7865), so that masks with softcap use MatMul and Softmax.

Dimensions: B batch, Hq query heads, Hk key heads, Tq queries, Tk keys, H hidden units, D and Dv columns.
"""

from __future__ import annotations

from typing import Any

from ...functional._attention_ops import AttentionArgs, Inputs
from ...reference.attention import LOWER_RIGHT, NONE, UPPER_LEFT
from ._graph import BOOL, FLOAT, HALF, INT32, INT64, Graph, Value


class Call:
    """Arguments of an op, and the parts of the computation that its outputs share."""

    def __init__(self, graph: Graph, arguments: dict[str, Any]) -> None:
        self.graph = graph
        self.inputs = Inputs(*(arguments[name] for name in Inputs._fields))
        self.args = AttentionArgs(*(arguments[name] for name in AttentionArgs._fields))
        if self.inputs.cu_q is not None:
            raise NotImplementedError(
                "varlen_attention: sequences must be padded in ONNX, got packed rows; use scaled_dot_product_attention "
                "with lengths"
            )
        if self.args.dropout_p > 0:
            raise NotImplementedError(
                f"attention: dropout_p must be 0 in ONNX, got {self.args.dropout_p}; call model.eval()"
            )
        self.q, self.k, self.v = arguments["q"], arguments["k"], arguments.get("v")
        self.dtype = self.q.dtype
        self.key_heads = self.k.shape[1]
        self.Tq, self.Tk = graph.size(self.q, 2), graph.size(self.k, 2)
        if self.inputs.k_lengths is not None:  # rows of padding may hold NaN
            valid = graph.before(graph.range(self.Tk), self.inputs.k_lengths, -1, 1, 1)  # [B, 1, Tk]
            valid, zero = graph.Unsqueeze(valid, graph.ints(3)), graph.constant(0.0, self.dtype)
            self.k = graph.Where(valid, self.k, zero)
            self.v = None if self.v is None else graph.Where(valid, self.v, zero)

    # ---- masks

    @property
    def float_mask(self) -> Value | None:
        mask = self.inputs.attn_mask
        return None if mask is None or mask.dtype == BOOL else mask

    @property
    def masked(self) -> bool:
        """Whether a query may attend to no key. With causality alone, all queries attend to the first key."""
        causal = self.args.causal == UPPER_LEFT
        return self.float_mask is not None or self.visible(causal=not causal) is not None

    def visible(self, causal: bool = True) -> Value | None:
        """bool, broadcast to [B, Hq, Tq, Tk]: whether a query attends to a key; None if to all.

        causal: whether to include causality. A float mask is not included.
        """
        graph, args, inputs = self.graph, self.args, self.inputs
        i = graph.Unsqueeze(graph.range(self.Tq), graph.ints(0, 1, 3))
        j = graph.Unsqueeze(graph.range(self.Tk), graph.ints(0, 1, 2))
        seen = []
        if inputs.attn_mask is not None and inputs.attn_mask.dtype == BOOL:
            seen.append(inputs.attn_mask)
        if inputs.q_lengths is not None:
            seen.append(graph.before(i, inputs.q_lengths, -1, 1, 1, 1))
        if inputs.k_lengths is not None:
            seen.append(graph.before(j, inputs.k_lengths, -1, 1, 1, 1))
        far = self.far()
        if args.causal != NONE and causal:
            seen.append(graph.GreaterOrEqual(far, graph.constant(0, INT64)))
        if args.window_left >= 0:
            seen.append(graph.LessOrEqual(far, graph.constant(args.window_left, INT64)))
        if args.window_right >= 0:
            seen.append(graph.GreaterOrEqual(far, graph.constant(-args.window_right, INT64)))
        if not seen:
            return None
        whole = seen[0]
        for one in seen[1:]:
            whole = graph.And(whole, one)
        return whole

    def far(self) -> Value:
        """int64 [B or 1, 1, Tq, Tk] position of a query minus that of a key."""
        graph = self.graph
        i = graph.Unsqueeze(graph.range(self.Tq), graph.ints(0, 1, 3))
        j = graph.Unsqueeze(graph.range(self.Tk), graph.ints(0, 1, 2))
        if self.args.causal == LOWER_RIGHT:
            q, k = self.inputs.q_lengths, self.inputs.k_lengths
            of_q, of_k = (
                size if given is None else graph.Cast(given, to=INT64) for size, given in ((self.Tq, q), (self.Tk, k))
            )
            i = graph.Add(i, graph.Reshape(graph.Sub(of_k, of_q), graph.ints(-1, 1, 1, 1)))
        return graph.Sub(i, j)

    # ---- the operator Attention

    def is_node(self) -> bool:
        masked = self.args.causal != NONE or any(given is not None for given in self.inputs)
        masked = masked or self.args.window_left >= 0 or self.args.window_right >= 0
        return (
            self.graph.opset_version >= 23
            and self.inputs.alibi_slopes is None
            and not (masked and self.args.softcap > 0)
            and (self.float_mask is None or self.float_mask.dtype == self.dtype)
        )

    def by_node(self) -> Value:
        """[B, Hq, Tq, Dv] out. Queries that attend to no key give zero in all releases of ONNX Runtime."""
        graph, args = self.graph, self.args
        attributes: dict[str, Any] = dict(scale=args.scale)
        if args.softcap > 0:
            attributes["softcap"] = args.softcap
        if self.dtype in HALF:
            attributes["softmax_precision"] = int(FLOAT)
        if not self.masked:
            if args.causal != NONE:
                attributes["is_causal"] = 1
            return graph.Attention(self.q, self.k, self.v, **attributes)
        seen, mask = self.visible(), self.float_mask
        if mask is None:
            mask = seen
            some = graph.Greater(self._any(graph.Cast(seen, to=INT32)), graph.constant(0, INT32))
        else:
            lowest = graph.constant(float("-inf"), self.dtype)
            mask = mask if seen is None else graph.Where(seen, mask, lowest)
            some = graph.Not(graph.is_lowest(self._any(mask), self.dtype))
        whole = graph.sizes(1, 1, self.Tq, self.Tk)  # ONNX Runtime broadcasts the first dimensions only
        out = graph.Attention(self.q, self.k, self.v, graph.Expand(mask, whole), **attributes)
        return graph.Where(some, out, graph.constant(0.0, self.dtype))

    def _any(self, mask: Value) -> Value:
        return self.graph.ReduceMax(mask, self.graph.ints(-1), keepdims=1)

    # ---- MatMul and Softmax

    def scores(self) -> Value:
        """[B, Hq, Tq, Tk] scores in float32 or wider, -inf for masked keys."""
        graph, args = self.graph, self.args
        dtype = self.wide_dtype
        q, k = graph.wide(self.q, self.dtype), graph.wide(self.by_head(self.k), self.dtype)
        products = graph.MatMul(q, graph.Transpose(k, perm=[0, 1, 3, 2]))
        scores = graph.Mul(products, graph.constant(args.scale, dtype))
        if args.softcap > 0:
            cap = graph.constant(args.softcap, dtype)
            scores = graph.Mul(graph.Tanh(graph.Div(scores, cap)), cap)
        if self.inputs.alibi_slopes is not None:
            slopes = graph.Reshape(self.inputs.alibi_slopes, graph.ints(-1, self.q.shape[1], 1, 1))
            far = graph.Cast(graph.Abs(self.far()), to=dtype)
            scores = graph.Sub(scores, graph.Mul(graph.Cast(slopes, to=dtype), far))
        if self.float_mask is not None:
            scores = graph.Add(scores, graph.Cast(self.float_mask, to=dtype))
        seen = self.visible()
        return scores if seen is None else graph.Where(seen, scores, graph.constant(float("-inf"), dtype))

    @property
    def wide_dtype(self) -> Any:
        return FLOAT if self.dtype in HALF else self.dtype

    def by_head(self, x: Value) -> Value:
        """Repeats the heads of [B, Hk, T, D] to [B, Hq, T, D]."""
        heads, own = self.q.shape[1], self.key_heads
        if own in (1, heads):
            return x
        repeated = self.graph.ints(1, 1, heads // own, 1, 1)
        x = self.graph.Expand(self.graph.Unsqueeze(x, self.graph.ints(2)), repeated)
        columns = self.graph.Shape(x, start=4, end=5)
        return self.graph.Reshape(x, self.graph.sizes(0, heads, -1, columns))


def softmax(graph: Graph, scores: Value, dtype: Any, masked: bool = True) -> Value:
    """Weights of scores. Rows of -inf, which occur only if `masked`, have weights of zero."""
    weights = graph.Softmax(scores, axis=-1)
    if not masked:
        return weights
    empty = graph.is_lowest(graph.ReduceMax(scores, graph.ints(-1), keepdims=1), dtype)
    return graph.Where(empty, graph.constant(0.0, dtype), weights)


def log_sum_exp(graph: Graph, scores: Value, dtype: Any) -> Value:
    """The logarithm of the softmax denominator; -inf for rows of -inf."""
    last = graph.ints(-1)
    top = graph.ReduceMax(scores, last, keepdims=1)
    top = graph.Where(graph.is_lowest(top, dtype), graph.constant(0.0, dtype), top)
    total = graph.ReduceSum(graph.Exp(graph.Sub(scores, top)), last, keepdims=1)
    return graph.Squeeze(graph.Add(graph.Log(total), top), last)


# ---- translations of the ops


def attention(graph: Graph, arguments: dict[str, Any]) -> tuple[Value, ...]:
    """out, lse and out_low of attention_forward. The nodes of lse are removed from the graph if it is not used."""
    call = Call(graph, arguments)
    scores = call.scores()
    if call.is_node():
        out = call.by_node()
    else:
        weights, values = softmax(graph, scores, call.wide_dtype, call.masked), graph.wide(call.v, call.dtype)
        out = graph.narrow(graph.MatMul(weights, call.by_head(values)), call.dtype)
    lse = log_sum_exp(graph, scores, call.wide_dtype)
    return out, lse, graph.constant(0.0, FLOAT)  # only the backward ops read out_low


def attention_weights(graph: Graph, arguments: dict[str, Any]) -> Value:
    call = Call(graph, arguments)
    return graph.narrow(softmax(graph, call.scores(), call.wide_dtype, call.masked), call.dtype)


def additive_attention(graph: Graph, arguments: dict[str, Any]) -> tuple[Value, Value]:
    """out [B, Tq, Dv] and weights [B, Tq, Tk] of additive_attention_forward."""
    query, key, value, v = (arguments[name] for name in ("query", "key", "value", "v"))
    mask, lengths, dtype = arguments["mask"], arguments["lengths"], query.dtype
    Tk, wide = graph.size(key, 1), FLOAT if dtype in HALF else dtype
    query, key, value, v = (graph.wide(t, dtype) for t in (query, key, value, v))
    seen = mask
    if lengths is not None:
        valid = graph.before(graph.range(Tk), lengths, -1, 1)  # [B, Tk]
        value = graph.Where(graph.Unsqueeze(valid, graph.ints(2)), value, graph.constant(0.0, wide))
        valid = graph.Unsqueeze(valid, graph.ints(1))
        seen = valid if mask is None else graph.And(mask, valid)
    pairs = graph.Add(graph.Unsqueeze(query, graph.ints(2)), graph.Unsqueeze(key, graph.ints(1)))
    scores = graph.MatMul(graph.Tanh(pairs), v)  # [B, Tq, Tk]
    if seen is not None:
        scores = graph.Where(seen, scores, graph.constant(float("-inf"), wide))
    weights = softmax(graph, scores, wide, masked=seen is not None)
    return graph.narrow(graph.MatMul(weights, value), dtype), weights


def additive_attention_key_exp(graph: Graph, arguments: dict[str, Any]) -> Value:
    """exp(2 key), which additive_attention does not read here."""
    key = graph.wide(arguments["key"], arguments["key"].dtype)
    return graph.Exp(graph.Add(key, key))
