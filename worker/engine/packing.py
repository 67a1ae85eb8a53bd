"""ONNX with weights as codes of a few bits, several in a byte."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, helper, numpy_helper
from torch import Tensor

from core.errors import StageFailed
from worker.engine.context import StageContext
from worker.engine.exporting import check_onnx, get_reference, make_onnx, save_graph
from worker.engine.importance import Map, by_input
from worker.engine.quantizing import read_grids
from worker.engine.tying import share_table
from worker.kernels.grids import Grid, divide, encode, fit

if TYPE_CHECKING:
    from worker.methods.exporters.onnx_int4 import OnnxInt4

DOMAIN = "com.microsoft"
BLOCKS = (256, 128, 64, 32, 16)  # weights that the runtime lets share a scale
ACCURACY_LEVELS = {"float32": 1, "int8": 4}
PACKED = {4: "_packed4", 8: "_packed8"}  # suffixes of codes by their bits


def write_onnx_int4(ctx: StageContext, settings: "OnnxInt4", folder: Path) -> dict[str, float]:
    """Writes the student as ONNX with weights in 4 bits, and returns its agreement with the student.

    Raises:
        StageFailed: `goal_missed` when too few labels agree, `export_unsupported` when no matrix can be packed.
    """
    proto, grids = onnx.load(make_onnx(ctx)), read_grids(ctx.input("student"))
    model = get_reference(ctx).model
    names = {id(parameter): name for name, parameter in model.named_parameters()}  # one each, of what two parts share
    known = {
        _digest((by_input(part) if isinstance(part, Map) else part.weight.detach()).numpy()): grids[name]
        for part in model.modules()
        for name in [names.get(id(getattr(part, "weight", None)))]
        if name in grids
    }
    share_table(proto.graph)
    _tell_left(ctx, *pack(proto.graph, known, settings))
    proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    save_graph(proto, folder)
    return check_onnx(ctx, folder, "onnx_int4", settings.min_agreement)


def pack(graph: GraphProto, known: dict[str, Grid], settings: "OnnxInt4") -> tuple[int, int]:
    """Replaces, in a graph, products with constant matrices and look-ups in tables by ones that read codes.

    A product with a turned table reads the codes of its look-ups. Returns how many matrices and tables stay as they
    are, as the runtime has no block that divides their rows, and of how many.

    Args:
        graph: What is changed.
        known: Grids that tensors are on, by what `_digest` says of weight_IO, or of a table: the graph has no names
            for them.
        settings: Of all others.
    """
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    tables = {name: array for name, array in arrays.items() if array.ndim == 2 and array.dtype == np.float32}
    turned = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Transpose"}
    grids = {name: known.get(_digest(array)) for name, array in tables.items()}
    is_packed: dict[str, bool] = {}
    nodes: list[NodeProto] = []
    for node in graph.node:
        packed, name, is_wanted = [node], "", bool(settings.embedding_bits)
        if node.op_type == "MatMul" and node.input[1] in tables:
            name, is_wanted = node.input[1], True
            packed = _pack_product(graph, node, tables[name], grids[name], settings)
        elif node.op_type == "MatMul" and turned.get(node.input[1]) in tables:
            name = turned[node.input[1]]
            packed = _pack_turned(graph, node, name, tables[name], grids[name], settings)
        elif node.op_type == "Gather" and node.input[0] in tables:
            name = node.input[0]
            packed = _pack_table(graph, node, tables[name], grids[name], settings)
        if name and (is_wanted or grids[name]):
            is_packed[name] = bool(packed)
        nodes += packed or [node]
    read = {name for node in nodes for name in node.input}
    del graph.node[:]
    graph.node.extend(node for node in nodes if node.op_type != "Transpose" or node.output[0] in read)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return [*is_packed.values()].count(False), len(is_packed)


def _tell_left(ctx: StageContext, num_left: int, num_matrices: int) -> None:
    """Warns of matrices that stay as they are. Raises StageFailed where all do."""
    why = f"{BLOCKS[-1]}, the smallest block of the runtime, does not divide their rows"
    if num_left and num_left == num_matrices:
        message = f"None of the {num_matrices} matrices can be stored in few bits: {why}."
        raise StageFailed("export_unsupported", message, suggestion="Choose onnx_int8, or leave this form out.")
    if num_left:
        message = f"{num_left} of {num_matrices} matrices stay in single precision: {why}."
        ctx.warn("matrices_unpacked", message, num_left=num_left, num_matrices=num_matrices)


def _pack_product(
    graph: GraphProto, node: NodeProto, weight_IO: NDArray[np.float32], known: Grid | None, settings: "OnnxInt4"
) -> list[NodeProto]:
    weight_OI = torch.from_numpy(weight_IO.T.copy())
    found = _find_grid(weight_OI, known, 4, settings)
    if found is None:
        return []
    grid, block = found
    bits = max(4, grid.bits)
    codes_OGI = encode(weight_OI, grid).to(torch.uint8).unflatten(1, (-1, block))
    names = _add(graph, node.input[1], codes_OGI, grid, bits)
    return [_multiply(node, names, weight_OI, bits, block, settings)]


def _pack_turned(
    graph: GraphProto,
    node: NodeProto,
    name: str,
    table_VI: NDArray[np.float32],
    known: Grid | None,
    settings: "OnnxInt4",
) -> list[NodeProto]:
    found = _find_table(table_VI, known, settings)
    if found is None:
        return []
    rows_VI, grid, block = found
    names = _add(graph, name, encode(rows_VI, grid).to(torch.uint8), grid, grid.bits)
    shape = np.array([len(rows_VI), -1, block * grid.bits // 8], np.int64)
    graph.initializer.append(numpy_helper.from_array(shape, f"{name}_shape"))
    cut = helper.make_node("Reshape", [names[0], f"{name}_shape"], [f"{name}_cut"])
    return [cut, _multiply(node, [f"{name}_cut", *names[1:]], rows_VI, grid.bits, block, settings)]


def _multiply(
    node: NodeProto, names: list[str], weight_OI: Tensor, bits: int, block: int, settings: "OnnxInt4"
) -> NodeProto:
    """Returns a product with codes_OGI of these names."""
    num_outputs, num_inputs = weight_OI.shape
    level = ACCURACY_LEVELS[settings.compute]
    sizes = {"K": num_inputs, "N": num_outputs, "bits": bits, "block_size": block, "accuracy_level": level}
    inputs = [node.input[0], *names]
    return helper.make_node("MatMulNBits", inputs, node.output, name=node.name, domain=DOMAIN, **sizes)


def _pack_table(
    graph: GraphProto, node: NodeProto, table_VI: NDArray[np.float32], known: Grid | None, settings: "OnnxInt4"
) -> list[NodeProto]:
    found = _find_table(table_VI, known, settings)
    if found is None:
        return []
    rows_VI, grid, block = found
    names = _add(graph, node.input[0], encode(rows_VI, grid).to(torch.uint8), grid, grid.bits)
    sizes = {"gather_axis": 0, "quantize_axis": 1, "block_size": block, "bits": grid.bits}
    inputs = [names[0], node.input[1], *names[1:]]
    return [helper.make_node("GatherBlockQuantized", inputs, node.output, name=node.name, domain=DOMAIN, **sizes)]


def _find_table(
    table_VI: NDArray[np.float32], known: Grid | None, settings: "OnnxInt4"
) -> tuple[Tensor, Grid, int] | None:
    """Returns the rows of a table, the grid that they are on (or one of `embedding_bits`), and how wide a block is."""
    rows_VI = torch.from_numpy(table_VI.copy())
    found = _find_grid(rows_VI, known, settings.embedding_bits, settings)
    return found and (rows_VI, *found)


def _find_grid(
    weight_OI: Tensor, known: Grid | None, bits: int | None, settings: "OnnxInt4"
) -> tuple[Grid, int] | None:
    """Returns the grid that weights are on, or one of so many bits, in blocks that the runtime has, and their size."""
    num_inputs = weight_OI.shape[1]
    width = num_inputs // known.scale_OG.shape[1] if known else settings.group
    block = next((block for block in BLOCKS if block <= width and width % block == num_inputs % block == 0), None)
    if block is None:
        return None
    if known:
        return divide(known, width // block), block
    return (fit(weight_OI, block, bits=bits, symmetric=False), block) if bits else None


def _add(graph: GraphProto, name: str, codes: Tensor, grid: Grid, bits: int) -> list[str]:
    """Adds codes, scales and zero points to a graph, unless they are there; returns their names."""
    zeros = grid.zero_OG.to(torch.uint8)
    codes, zeros = (_halve(codes), _halve(zeros)) if bits == 4 else (codes, zeros)
    tensors = {f"{name}{PACKED[bits]}": codes, f"{name}_scale": grid.scale_OG, f"{name}_zero_point": zeros}
    if not any(tensor.name in tensors for tensor in graph.initializer):
        graph.initializer.extend(numpy_helper.from_array(tensor.numpy(), key) for key, tensor in tensors.items())
    return list(tensors)


def _halve(codes: Tensor) -> Tensor:
    """Returns codes of 4 bits with two in a byte, the first of them in the low bits; an odd row ends in a zero."""
    even = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return even[..., 0::2] | (even[..., 1::2] << 4)


def _digest(weight_IO: NDArray[np.float32]) -> str:
    return hashlib.sha256(np.ascontiguousarray(weight_IO).tobytes()).hexdigest()
