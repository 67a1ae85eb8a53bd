"""Tables that are the last layer as well, in graphs of ONNX: each is stored once."""

from typing import NamedTuple

import numpy as np
from onnx import GraphProto, NodeProto, helper, numpy_helper


class Tied(NamedTuple):
    """The names of a table, and of the turned copy of it that a product has."""

    table: str
    copy: str


def find_tied(graph: GraphProto) -> list[Tied]:
    """Returns which products have a table of the graph, turned."""
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    tables = {node.input[0] for node in graph.node if node.op_type == "Gather" and node.input[0] in arrays}
    copies = {node.input[1] for node in graph.node if node.op_type == "MatMul" and node.input[1] in arrays}
    pairs = [Tied(table, copy) for copy in sorted(copies) for table in sorted(tables)]
    return [tied for tied in pairs if np.array_equal(arrays[tied.table].T, arrays[tied.copy])]


def share_table(graph: GraphProto) -> None:
    """Has a last layer that is the embedding read it, instead of a turned copy of its own."""
    for tied in find_tied(graph):
        _drop(graph, tied.copy)
        graph.node.insert(0, _turn(tied.table, tied.copy))


def share_codes(graph: GraphProto, tied: Tied) -> None:
    """Does the same in a graph of 8 bits, as `quantize_dynamic` makes it: look-ups read the codes of the product.

    These have a scale for each row of the table, or one for all, so that a look-up is no worse than before.
    """
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    codes, scale, zero = (f"{tied.copy}_{part}" for part in ("quantized", "scale", "zero_point"))
    table = f"{tied.table}_quantized"
    rows = {f"{tied.table}_row_scale": arrays[scale], f"{tied.table}_row_zero_point": arrays[zero].astype(np.float32)}
    rows_V1 = {name: np.broadcast_to(row, arrays[codes].shape[1])[:, None] for name, row in rows.items()}
    _drop(graph, codes, table, f"{tied.table}_scale", f"{tied.table}_zero_point")
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(arrays[codes].T), table))
    graph.initializer.extend(numpy_helper.from_array(row.copy(), name) for name, row in rows_V1.items())
    nodes = [_turn(table, codes)]
    looked_up = {node.output[0]: node for node in graph.node if node.op_type == "Gather" and node.input[0] == table}
    for node in graph.node:
        found = looked_up.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        nodes += _look_up(found, node, *rows) if found else [node]
    del graph.node[:]
    graph.node.extend(nodes)


def _look_up(gather: NodeProto, dequantize: NodeProto, scale: str, zero: str) -> list[NodeProto]:
    """Returns what a look-up in codes gives, (code - zero) · scale, each of its row."""
    name, ids = gather.output[0], gather.input[1]
    return [
        helper.make_node("Gather", [scale, ids], [f"{name}_scale"]),
        helper.make_node("Gather", [zero, ids], [f"{name}_zero"]),
        helper.make_node("Cast", [name], [f"{name}_code"], to=1),
        helper.make_node("Sub", [f"{name}_code", f"{name}_zero"], [f"{name}_difference"]),
        helper.make_node("Mul", [f"{name}_difference", f"{name}_scale"], [dequantize.output[0]]),
    ]


def _turn(table: str, copy: str) -> NodeProto:
    return helper.make_node("Transpose", [table], [copy], name=f"{copy}_turned", perm=[1, 0])


def _drop(graph: GraphProto, *names: str) -> None:
    kept = [tensor for tensor in graph.initializer if tensor.name not in names]
    del graph.initializer[:]
    graph.initializer.extend(kept)
