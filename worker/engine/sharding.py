"""A model whose layers' weights, gradients and moments are split among the processes that train it together.

Each process holds its part of every layer. A layer is put together while it runs and again for the way back, and its
gradient is summed straight into the parts. So every process must run it as often as the others. Embeddings and the last
layer stay whole, and so does all that is written: files and checkpoints are those of one process.

Papers: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", section 5.3;
Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", section 3.
"""

import logging
from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Module, Parameter
from torch.nn.utils import get_total_norm
from transformers import PreTrainedModel

from worker.engine import ranks
from worker.engine.devices import choose_device
from worker.engine.loading import find_layers

NOT_ZERO = 1e-6  # added to a norm that is divided by, as torch does
log = logging.getLogger(__name__)


def shard_layers(model: PreTrainedModel) -> None:
    """Splits the model's layers among the processes; `join_layers` ends it."""
    mesh = init_device_mesh(choose_device().type, (ranks.count(),))
    layers = [*model.get_submodule(find_layers(model)[0]).children()]
    split = {parameter for layer in layers for parameter in layer.parameters()}
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    whole = {parameter for parameter in model.base_model.parameters() if parameter not in split}
    fully_shard(model.base_model, mesh=mesh, ignored_params=whole)  # so that the next layer comes while one runs
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss was divided by the rows of all processes
            module.set_force_sum_reduction_for_comms(True)
    held, total = _count(model, only_here=True), _count(model, only_here=False)
    log.info("each of %d processes holds %d of %d parameters", ranks.count(), held, total)


def _count(model: PreTrainedModel, *, only_here: bool) -> int:
    parameters = (p.to_local() if only_here and isinstance(p, DTensor) else p for p in model.parameters())
    return sum(parameter.numel() for parameter in parameters)


def join_layers(model: PreTrainedModel) -> None:
    """Gives every layer its whole weights back, on the processor, in the first process; all must call it."""
    split = {name: parameter.detach() for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)}
    for name, tensor in whole_on_first(split).items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_parameter(leaf, Parameter(tensor))


def is_sharded(model: Module) -> bool:
    """Tells whether every process must run this model as often as the others."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def whole_on_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns all of each tensor, in the first process, and of those that are split nothing in the others.

    Split ones come onto the processor; all processes must call it.
    """
    found = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            found[name] = tensor
            continue
        joined = tensor.full_tensor()
        if ranks.number() == 0:
            found[name] = joined.cpu()
    return found


def part_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Returns a whole tensor where the other one is, or of it what this process is to hold, if that one is split."""
    if tensor.shape != other.shape:
        return tensor
    if not isinstance(other, DTensor):
        return tensor.to(other.device)
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def parts_like(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns of each tensor what is to be held of it here, by the ones of the same names."""
    return {name: part_like(tensor, others.get(name, tensor)) for name, tensor in tensors.items()}


def clip_gradients(parameters: Iterable[Parameter], limit: float | None) -> float:
    """Returns the norm of all gradients, in all processes; with a limit, shortens longer ones to it.

    Paper: Pascanu et al. 2013, "On the difficulty of training recurrent neural networks", section 3.2.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    split = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    others = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    norm = get_total_norm(others)
    if split:
        norm = (norm**2 + ranks.add_up(get_total_norm(split) ** 2)).sqrt()
    if limit is not None:
        scale = (limit / (norm + NOT_ZERO)).clamp(max=1.0)
        for gradient in (*others, *split):
            gradient.mul_(scale)
    return float(norm)
