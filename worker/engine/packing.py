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

from worker.engine.context import StageContext
from worker.engine.exporting import check_onnx, get_reference, make_onnx
from worker.engine.importance import Map, by_input
from worker.engine.quantizing import read_grids
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
        StageFailed: `goal_missed` when too few labels agree.
    """
    proto, grids = onnx.load(make_onnx(ctx)), read_grids(ctx.input("student"))
    modules = {name: part for name, part in get_reference(ctx).model.named_modules() if isinstance(part, Map)}
    known = {
        _digest(by_input(module).numpy()): grids[f"{name}.weight"]
        for name, module in modules.items()
        if f"{name}.weight" in grids
    }
    pack(proto.graph, known, settings)
    proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    onnx.save(proto, folder / "model.onnx")
    return check_onnx(ctx, folder, "onnx_int4", settings.min_agreement)


def pack(graph: GraphProto, known: dict[str, Grid], settings: "OnnxInt4") -> None:
    """Replaces, in a graph, products with constant matrices and look-ups in tables by ones that read codes.

    Args:
        graph: What is changed.
        known: Grids that matrices are on, by what `_digest` says of weight_IO: the graph has no names for them.
        settings: Of all others.
    """
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    tables = {name: array for name, array in arrays.items() if array.ndim == 2 and array.dtype == np.float32}
    nodes = []
    for node in graph.node:
        packed = None
        if node.op_type == "MatMul" and node.input[1] in tables:
            packed = _pack_product(graph, node, tables[node.input[1]], known, settings)
        elif node.op_type == "Gather" and node.input[0] in tables:
            packed = _pack_table(graph, node, tables[node.input[0]], settings)
        nodes.append(packed or node)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _pack_product(
    graph: GraphProto, node: NodeProto, weight_IO: NDArray[np.float32], known: dict[str, Grid], settings: "OnnxInt4"
) -> NodeProto | None:
    weight_OI, grid = torch.from_numpy(weight_IO.T.copy()), known.get(_digest(weight_IO))
    num_outputs, num_inputs = weight_OI.shape
    width = num_inputs // grid.scale_OG.shape[1] if grid else settings.group
    block = next((block for block in BLOCKS if block <= width and width % block == num_inputs % block == 0), None)
    if block is None:
        return None
    grid = divide(grid, width // block) if grid else fit(weight_OI, block, bits=4, symmetric=False)
    codes_OI = encode(weight_OI, grid).to(torch.uint8).unflatten(1, (-1, block))
    names = _add(graph, node.input[1], codes_OI, grid, 4)
    level = ACCURACY_LEVELS[settings.compute]
    sizes = {"K": num_inputs, "N": num_outputs, "bits": 4, "block_size": block, "accuracy_level": level}
    inputs = [node.input[0], *names]
    return helper.make_node("MatMulNBits", inputs, node.output, name=node.name, domain=DOMAIN, **sizes)


def _pack_table(
    graph: GraphProto, node: NodeProto, table_VI: NDArray[np.float32], settings: "OnnxInt4"
) -> NodeProto | None:
    bits, width = settings.embedding_bits, table_VI.shape[1]
    block = next((block for block in BLOCKS if block <= settings.group and width % block == 0), None)
    if bits is None or block is None:
        return None
    rows_VI = torch.from_numpy(table_VI.copy())
    grid = fit(rows_VI, block, bits=bits, symmetric=False)
    names = _add(graph, node.input[0], encode(rows_VI, grid).to(torch.uint8), grid, bits)
    sizes = {"gather_axis": 0, "quantize_axis": 1, "block_size": block, "bits": bits}
    inputs = [names[0], node.input[1], *names[1:]]
    return helper.make_node("GatherBlockQuantized", inputs, node.output, name=node.name, domain=DOMAIN, **sizes)


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
