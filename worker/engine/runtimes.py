"""Exported models as a user runs them: torch for `transformers` folders, onnxruntime for ONNX, OpenVINO for its own."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from worker.engine.devices import keeping_denormals
from worker.engine.extras import needing
from worker.engine.loading import OFFLINE, input_names
from worker.engine.tracing import PAST

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Forward = Callable[[dict[str, Tensor]], NDArray[np.float32]]


def open_session(folder: Path, num_threads: int) -> "InferenceSession":
    """Returns an onnxruntime session on the processor."""
    import onnxruntime  # starts a thread, which no stage would have that was forked later

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    with keeping_denormals():
        return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def run_session(session: "InferenceSession", inputs: dict[str, Tensor]) -> NDArray[np.float32]:
    """Returns logits_BC for the inputs that the session names; a decoder has read nothing before."""
    logits_BC: NDArray[np.float32] = session.run(["logits"], _complete(session, inputs))[0]
    return logits_BC


def _complete(session: "InferenceSession", inputs: dict[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Returns what a session takes: of a decoder also which tokens are there, where they stand, and an empty cache."""
    ids_BT = inputs["input_ids"]
    known = {"attention_mask": torch.ones_like(ids_BT), "position_ids": ids_BT.new_ones(ids_BT.shape).cumsum(1) - 1}
    return {
        node.name: np.zeros((len(ids_BT), node.shape[1], 0, node.shape[3]), np.float32)
        if node.name.startswith(PAST)
        else (known | inputs)[node.name].numpy()
        for node in session.get_inputs()
    }


def continue_greedily(session: "InferenceSession", ids_BT: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Returns texts with so many more tokens, each the likeliest, and the logits that each was chosen by, logits_BNV.

    A token is read alone, with the keys and values of those before it.
    """
    outputs = [node.name for node in session.get_outputs()]
    given, chosen = _complete(session, {"input_ids": ids_BT}), []
    for place in range(ids_BT.shape[1], ids_BT.shape[1] + num_tokens):
        logits_BTV, *kept = session.run(outputs, given)
        chosen.append(torch.from_numpy(logits_BTV[:, -1]))
        ids_BT = torch.cat([ids_BT, chosen[-1].argmax(-1, keepdim=True)], dim=1)
        given = {name.replace("present.", PAST): part for name, part in zip(outputs[1:], kept, strict=True)}
        given["input_ids"] = ids_BT[:, -1:].numpy()
        given["attention_mask"] = np.ones(ids_BT.shape, np.int64)
        given["position_ids"] = np.full_like(given["input_ids"], place)
    return ids_BT, torch.stack(chosen, dim=1)


class Running:
    """A folder with a `model.onnx` in its runtime, where a model is asked for."""

    runtime, training, device = "onnxruntime", False, torch.device("cpu")
    has_plain_head = False  # it gives logits, and not what makes them

    def __init__(self, folder: Path, num_threads: int) -> None:
        self._session = open_session(folder, num_threads)
        self.config = AutoConfig.from_pretrained(folder, **OFFLINE)

    def forward(self, inputs: dict[str, Tensor]) -> NDArray[np.float32]:
        """Returns logits_BC for the inputs."""
        return run_session(self._session, inputs)

    def __call__(self, **inputs: Any) -> SimpleNamespace:
        """Returns its logits, as a model of `transformers` does."""
        return SimpleNamespace(logits=torch.from_numpy(self.forward(inputs)))

    def train(self, _: bool = True) -> "Running":
        """Changes nothing, as it cannot be trained."""
        return self

    eval = train

    def modules(self) -> Iterator[torch.nn.Module]:
        """Yields nothing."""
        return iter(())


class OpenModel(NamedTuple):
    """A loaded model: its forward function, what it takes, the library that runs it, and its number of parameters.

    `module` is the model itself, where that is one of torch.
    """

    forward: Forward
    input_names: list[str]
    runtime: str
    num_parameters: int
    module: PreTrainedModel | None = None


def open_model(
    folder: Path, load: Callable[[Path], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, num_threads: int
) -> OpenModel:
    """Returns the folder's model, on the processor; `load` reads one of transformers."""
    if (folder / "model.onnx").is_file():
        return _open_onnx(folder, num_threads)
    if (folder / "model.xml").is_file():
        with needing("openvino"):
            from worker.engine.openvino_files import open_openvino
        return open_openvino(folder, num_threads)
    return _open_torch(load(folder), tokenizer)


def _open_onnx(folder: Path, num_threads: int) -> OpenModel:
    session = open_session(folder, num_threads)
    names = [node.name for node in session.get_inputs()]
    num_parameters = count_onnx_parameters(folder / "model.onnx")
    return OpenModel(lambda inputs: run_session(session, inputs), names, "onnxruntime", num_parameters)


def _open_torch(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> OpenModel:
    model.eval()

    def forward(inputs: dict[str, Tensor]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits_BC: NDArray[np.float32] = model(**inputs).logits.float().numpy()
            return logits_BC

    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return OpenModel(forward, input_names(model, tokenizer), "torch", num_parameters, model)


def count_onnx_parameters(path: Path) -> int:
    """Returns the number of values in the graph's weights, without the scales and zero points of quantised ones."""
    weights = onnx.load(str(path), load_external_data=False).graph.initializer
    side = ("_scale", "_zero_point")
    return sum(
        int(np.prod(weight.dims)) * (2 if weight.name.endswith("_packed4") else 1)
        for weight in weights
        if weight.dims and not weight.name.endswith(side) and weight.data_type != onnx.TensorProto.INT64
    )
