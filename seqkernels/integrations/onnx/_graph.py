"""Nodes of ONNX graphs, as the translations add them.

Values are onnx_ir.Value. onnx_ir is optional, so that the type checker does not see its types.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import evaluator

Value = Any  # a tensor in the graph

BOOL, INT32, INT64, FLOAT, DOUBLE = (
    ir.DataType.BOOL,
    ir.DataType.INT32,
    ir.DataType.INT64,
    ir.DataType.FLOAT,
    ir.DataType.DOUBLE,
)
HALF = ir.DataType.FLOAT16, ir.DataType.BFLOAT16
LAST = int(np.iinfo(np.int64).max)


class Nodes:
    """A list of nodes. A method adds one: nodes.MatMul(a, b) returns its output.

    Keyword arguments are attributes, except `outputs`, the number of outputs; several are returned as a list.
    """

    def __init__(self, nodes: list[Any], opset_version: int, prefix: str = "") -> None:
        self.nodes, self.opset_version, self.prefix = nodes, opset_version, prefix

    def __getattr__(self, op_type: str) -> Any:
        if not op_type[0].isupper():
            raise AttributeError(op_type)

        def add(*inputs: Value, outputs: int = 1, **attributes: Any) -> Any:
            given = list(inputs)
            while given and given[-1] is None:
                given.pop()
            at, prefix = len(self.nodes), self.prefix
            names = [f"{prefix}_{op_type}_{at}_{i}" if prefix else None for i in range(outputs)]
            made = [ir.Value(name=name) for name in names]
            node = ir.Node(
                "",
                op_type,
                given,
                ir.convenience.convert_attributes(attributes),
                outputs=made,
                name=f"{prefix}_node_{at}" if prefix else None,
                version=self.opset_version,
            )
            node.meta["seqkernels"] = True
            self.nodes.append(node)
            return made[0] if outputs == 1 else made

        return add

    def constant(self, value: Any, dtype: Any) -> Value:
        return self.Constant(value=ir.tensor(value, dtype=dtype))

    def ints(self, *values: int) -> Value:
        return self.constant(list(values), INT64)

    def split(self, x: Value, parts: int) -> list[Value]:
        """Equal parts of the last dimension."""
        if parts == 1:
            return [x]
        found: list[Value] = self.Split(x, axis=-1, num_outputs=parts, outputs=parts)
        return found

    def part(self, x: Value, first: int, last: int, dim: int = 0) -> Value:
        return self.Slice(x, self.ints(first), self.ints(last), self.ints(dim))


class Graph(Nodes):
    """The graph that torch.onnx.export builds."""

    def __init__(self) -> None:
        recorder: Any = evaluator.default()
        super().__init__(recorder.nodes, recorder.opset.version)
        self._opset = recorder.opset

    def result(self, value: Value) -> Value:
        """A value for translations of torch, which require the class of their own values."""
        return self._opset.Identity(value)

    # ---- sizes

    def size(self, x: Value, dim: int) -> Value:
        """[1] size of a dimension."""
        known = x.shape[dim] if x.shape is not None else None
        return self.ints(known) if isinstance(known, int) else self.Shape(x, start=dim, end=dim + 1)

    def sizes(self, *parts: int | Value) -> Value:
        """A shape of numbers and values [1]."""
        if all(isinstance(part, int) for part in parts):
            return self.ints(*parts)
        return self.Concat(*(self.ints(part) if isinstance(part, int) else part for part in parts), axis=0)

    def full(self, value: float, dtype: Any, *parts: int | Value) -> Value:
        return self.Expand(self.constant(value, dtype), self.sizes(*parts))

    def range(self, size: Value) -> Value:
        """int64 [n] of 0, 1, and so on. size: [1]."""
        return self.Range(self.constant(0, INT64), self.Squeeze(size, self.ints(0)), self.constant(1, INT64))

    # ---- views, dtypes, masks

    def flipped(self, x: Value) -> Value:
        """x with the order of dimension 0 reversed."""
        return self.Slice(x, self.ints(-1), self.ints(-LAST), self.ints(0), self.ints(-1))

    def wide(self, x: Value, dtype: Any) -> Value:
        """x in float32 if `dtype` is a half type, which the kernels compute in float32."""
        return self.Cast(x, to=FLOAT) if dtype in HALF else x

    def narrow(self, x: Value, dtype: Any) -> Value:
        """The inverse of `wide`."""
        return self.Cast(x, to=dtype) if dtype in HALF else x

    def is_lowest(self, x: Value, dtype: Any) -> Value:
        """Whether elements are -inf."""
        return self.Equal(x, self.constant(-math.inf, dtype))

    def before(self, positions: Value, lengths: Value, *shape: int) -> Value:
        """Whether positions are less than the lengths [B], which are reshaped to `shape`."""
        return self.Less(positions, self.Reshape(self.Cast(lengths, to=INT64), self.ints(*shape)))


class Body(Nodes):
    """The body of a Scan. Its nodes may read values of the graph around it.

    prefix: the beginning of all names, which ONNX Runtime requires to differ from those of the graph around it.
    """

    def __init__(self, graph: Graph, prefix: str) -> None:
        super().__init__([], graph.opset_version, prefix)
        self.graph = graph
        self.inputs: list[Value] = []

    def input(self, dtype: Any, *sizes: Any) -> Value:
        name = f"{self.prefix}_input_{len(self.inputs)}"
        value = ir.Value(name=name, shape=ir.Shape(sizes), type=ir.TensorType(dtype))
        self.inputs.append(value)
        return value

    def scan(self, states: Sequence[Value], scanned: Sequence[Value], outputs: Sequence[Value]) -> list[Value]:
        """Adds the Scan to the graph.

        Args:
            states: initial states, of the first inputs. scanned: values with a dimension of steps, of the other inputs.
            outputs: the new states, then values to stack.
        Returns:
            The last states, then the stacked values.
        """
        outputs = [self.Identity(value) for value in outputs]  # so that no output is an input or occurs twice
        body = ir.Graph(self.inputs, outputs, nodes=self.nodes, name=self.prefix)
        found: list[Value] = self.graph.Scan(
            *states, *scanned, body=body, num_scan_inputs=len(scanned), outputs=len(outputs)
        )
        return found if len(outputs) > 1 else [found]
