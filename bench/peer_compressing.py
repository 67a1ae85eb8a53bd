"""The peers of `compressing.py`; run as a script, the one that makes ONNX in 8 bits without a line of ours.

python bench/peer_compressing.py MODEL OUT
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import Linear
from torch.nn.utils import prune

Batches = Sequence[dict[str, torch.Tensor]]  # tokenised texts with their `labels`


def prune_neurons(model: Any, batches: Batches) -> Any:
    """Half of the neurons of each layer, by Torch-Pruning and its Taylor criterion."""
    import torch_pruning

    model.eval()
    for batch in batches:
        model(**batch).loss.backward()
    pruner = torch_pruning.pruner.BasePruner(
        model,
        {name: ids[:1] for name, ids in batches[0].items() if name != "labels"},
        importance=torch_pruning.importance.GroupTaylorImportance(),
        pruning_ratio=0.0,
        pruning_ratio_dict={layer.intermediate.dense: 0.5 for layer in model.bert.encoder.layer},
        output_transform=lambda output: output.logits.sum(),
    )
    pruner.step()
    model.config.intermediate_size = model.bert.encoder.layer[0].intermediate.dense.out_features
    return model


def round_weights(model: Any, batches: Batches) -> Any:
    """Weights of 4 bits, by the GPTQ of Intel Neural Compressor, one input after the other."""
    from neural_compressor.torch.quantization import GPTQConfig, convert, prepare

    config = GPTQConfig(bits=4, group_size=64, use_sym=False, percdamp=0.01, act_order=False, block_size=128)
    prepared = prepare(model.eval(), config)
    for batch in batches:
        prepared(**batch)
    return convert(prepared)


def unpack(model: Any) -> Any:
    """Returns the model with plain matrices in place of those that hold codes."""
    for name, module in [*model.named_modules()]:
        if hasattr(module, "recover"):
            plain = Linear(module.in_features, module.out_features)
            plain.load_state_dict({"weight": module.recover(), "bias": module.bias})
            model.set_submodule(name, plain)
    return model


def make_zeros(model: Any, batches: Batches) -> Any:  # noqa: ARG001 - as the others are called
    """Half of the weights of each matrix of the layers, by `torch.nn.utils.prune`."""
    for module in model.bert.encoder.modules():
        if isinstance(module, Linear):
            prune.l1_unstructured(module, "weight", amount=0.5)
            prune.remove(module, "weight")
    return model


def write_int8(source: Path, folder: Path) -> None:
    """Writes a classifier as ONNX, and with weights in 8 bits, by nothing but stock calls."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForSequenceClassification.from_pretrained(source, attn_implementation="eager").eval()
    inputs = tokenizer(["a text", "and another one"], padding=True, return_tensors="pt")
    names = ["input_ids", "attention_mask", "token_type_ids"]
    both = {0: "batch", 1: "sequence"}
    torch.onnx.export(
        model,
        tuple(inputs[name] for name in names),
        folder / "plain.onnx",
        input_names=names,
        output_names=["logits"],
        dynamic_axes=dict.fromkeys(names, both) | {"logits": {0: "batch"}},
        dynamo=False,
    )
    quantize_dynamic(folder / "plain.onnx", folder / "model.onnx", weight_type=QuantType.QInt8)
    tokenizer.save_pretrained(folder)
    labels = [model.config.id2label[number] for number in range(model.config.num_labels)]
    (folder / "labels.json").write_text(json.dumps(labels))
    (folder / "plain.onnx").unlink()


if __name__ == "__main__":
    write_int8(*map(Path, sys.argv[1:]))
