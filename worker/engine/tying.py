"""Tables that are the last layer as well, in graphs of ONNX: each is stored once."""

from typing import NamedTuple

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper


class Tied(NamedTuple):
    """The names of a table, and of the turned copy of it that a product has."""

    table: str
    copy: str


def find_tied(graph: GraphProto) -> list[Tied]:
    """Returns which products have a table of the graph, turned; a product has one."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    tables = {node.input[0] for node in graph.node if node.op_type == "Gather" and node.input[0] in tensors}
    copies = {node.input[1] for node in graph.node if node.op_type == "MatMul" and node.input[1] in tensors}
    found = {
        copy: table
        for copy in sorted(copies)
        for table in sorted(tables)
        if [*tensors[table].dims] == [*tensors[copy].dims][::-1]
        and np.array_equal(numpy_helper.to_array(tensors[table]).T, numpy_helper.to_array(tensors[copy]))
    }
    return [Tied(table, copy) for copy, table in found.items()]


def share_table(graph: GraphProto) -> None:
    """Has a last layer that is the embedding read it, instead of a turned copy of its own."""
    for tied in find_tied(graph):
        _drop(graph, tied.copy)
        graph.node.insert(0, _turn(tied.table, tied.copy))


def share_codes(graph: GraphProto, tied: Tied) -> None:
    """Does the same in a graph of 8 bits, as `quantize_dynamic` makes it: look-ups read the codes of the product.

    These have a scale for each row of the table, or one for all, so that a look-up is no worse than before.
    """
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    codes, table = f"{tied.copy}_quantized", f"{tied.table}_quantized"
    codes_IV = numpy_helper.to_array(tensors[codes])
    rows_V1 = {
        f"{tied.table}_row_{part}": np.broadcast_to(known.astype(np.float32), codes_IV.shape[1])[:, None]
        for part in ("scale", "zero_point")
        for known in [numpy_helper.to_array(tensors[f"{tied.copy}_{part}"])]
    }
    _drop(graph, codes, table, f"{tied.table}_scale", f"{tied.table}_zero_point")
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(codes_IV.T), table))
    graph.initializer.extend(numpy_helper.from_array(row.copy(), name) for name, row in rows_V1.items())
    nodes = [_turn(table, codes)]
    looked_up = {node.output[0]: node for node in graph.node if node.op_type == "Gather" and node.input[0] == table}
    for node in graph.node:
        found = looked_up.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        nodes += _look_up(found, node, *rows_V1) if found else [node]
    del graph.node[:]
    graph.node.extend(nodes)


def _look_up(gather: NodeProto, dequantize: NodeProto, scale: str, zero: str) -> list[NodeProto]:
    """Returns what a look-up in codes gives, (code - zero) · scale, each of its row."""
    name, ids = gather.output[0], gather.input[1]
    return [
        helper.make_node("Gather", [scale, ids], [f"{name}_scale"]),
        helper.make_node("Gather", [zero, ids], [f"{name}_zero"]),
        helper.make_node("Cast", [name], [f"{name}_code"], to=TensorProto.FLOAT),
        helper.make_node("Sub", [f"{name}_code", f"{name}_zero"], [f"{name}_difference"]),
        helper.make_node("Mul", [f"{name}_difference", f"{name}_scale"], [dequantize.output[0]]),
    ]


def _turn(table: str, copy: str) -> NodeProto:
    return helper.make_node("Transpose", [table], [copy], name=f"{copy}_turned", perm=[1, 0])


def _drop(graph: GraphProto, *names: str) -> None:
    kept = [tensor for tensor in graph.initializer if tensor.name not in names]
    del graph.initializer[:]
    graph.initializer.extend(kept)
