"""Last layers, which compute in float32 also where a model runs in bf16, against float64 and plain products."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Gemma2Config,
    GraniteConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from tests.engine_bench import FAST, Bench, make_spec
from tests.unit.test_engine_branches import ARCHITECTURES, COLUMNS, ids, make_branched
from tests.unit.test_engine_models import LLAMA
from tests.unit.test_engine_models import SIZES as DECODER
from worker.engine.finetuning import make_trainer
from worker.engine.inference import logits_of
from worker.engine.loading import output_layer
from worker.engine.next_tokens import predict_next

CONFIGS = {name: config for name, (config, *_) in ARCHITECTURES.items()} | {"llama": LLAMA}
CAPPED = {
    "gemma2": Gemma2Config(**DECODER, num_key_value_heads=2, head_dim=16, final_logit_softcapping=5.0, pad_token_id=0),
    "granite": GraniteConfig(**DECODER, num_key_value_heads=2, logits_scaling=4.0, pad_token_id=0),
}
IN_BF16 = torch.autocast("cpu", torch.bfloat16)


def make(auto_class: Any, config: PreTrainedConfig, **changes: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.update(changes)
    model: PreTrainedModel = auto_class.from_config(config).eval()
    return model


def note_inputs(layer: torch.nn.Module) -> list[Tensor]:
    """Returns a list that is going to hold what the layer gets."""
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda _, given, __: seen.append(given[0].detach()))
    return seen


@pytest.mark.parametrize("auto_class", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_classifier_loses_no_gradient(architecture: str, auto_class: Any) -> None:
    """Logits of spread 10, a student near its teacher, as in the test of what a language model's head does."""
    model = make(auto_class, CONFIGS[architecture], num_labels=50)
    layer, inputs = model.get_submodule(output_layer(model)), {"input_ids": ids(0, num_texts=30)}
    with torch.no_grad():
        layer.weight *= 10 / model(**inputs).logits.std()
    seen = note_inputs(layer)
    with IN_BF16:
        logits = logits_of(model, inputs)
        rounded = model(**inputs).logits
    weight, bias = (None if x is None else x.detach().double() for x in (layer.weight, layer.bias))
    assert weight is not None
    exact = F.linear(seen[0].double(), weight, bias)
    exact = exact if exact.dim() == logits.dim() else exact[:, -1]  # of a decoder the last token answers
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-4)
    teacher = (exact + 0.05 * torch.randn_like(exact)).softmax(-1)
    gradient = exact.softmax(-1) - teacher
    errors = [(x.double().softmax(-1) - teacher - gradient).norm() / gradient.norm() for x in (logits, rounded)]
    assert errors[0] < 0.01
    assert rounded.dtype == torch.bfloat16  # and the layer is again as it was
    assert errors[1] > 0.1


def test_a_model_answers_as_it_is_where_it_runs_in_float32() -> None:
    model = make(AutoModelForSequenceClassification, CONFIGS["bert"])
    assert torch.equal(logits_of(model, {"input_ids": ids(0)}), model(input_ids=ids(0)).logits)


def test_a_layer_of_which_each_task_has_rows_rounds_nothing() -> None:
    model, views = make_branched("bert", 1)
    seen = note_inputs(model.classifier)
    for name, columns in COLUMNS.items():
        with IN_BF16:
            logits_BC = logits_of(views[name], {"input_ids": ids(0)})  # type: ignore[arg-type]
        exact_BC = F.linear(seen.pop(), model.classifier.weight, model.classifier.bias)[:, columns]
        torch.testing.assert_close(logits_BC, exact_BC)


def test_a_layer_that_each_adapter_has_rounds_nothing() -> None:
    model = make(AutoModelForSequenceClassification, CONFIGS["bert"])
    config = LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    wrapped = get_peft_model(model, config, "one")
    wrapped.add_adapter("other", config)
    for name in ("one", "other"):
        wrapped.set_adapter(name)
        layer = model.classifier.modules_to_save[name]
        torch.nn.init.normal_(layer.weight)
        seen = note_inputs(layer)
        with IN_BF16:
            logits_BC = logits_of(model, {"input_ids": ids(0)})
        torch.testing.assert_close(logits_BC, F.linear(*seen, layer.weight, layer.bias))


@pytest.mark.parametrize("kind", CAPPED)
def test_logits_that_are_scaled_or_capped_are_not_rounded(kind: str) -> None:
    model, inputs = make(AutoModelForCausalLM, CAPPED[kind]), {"input_ids": ids(0)}
    layer = model.get_output_embeddings()
    seen = note_inputs(layer)
    with IN_BF16:
        logits_NV = predict_next(model, inputs, torch.ones_like(inputs["input_ids"], dtype=torch.bool))
    assert isinstance(logits_NV, Tensor)
    product_NV = F.linear(seen[-1], layer.weight).flatten(0, 1)
    expected_NV = 5 * torch.tanh(product_NV / 5) if kind == "gemma2" else product_NV / 4
    torch.testing.assert_close(logits_NV, expected_NV)


def test_years_are_learned_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between 1,024 and 2,048 a number of bf16 has 7 bits beside the first one, so that its steps are 8."""
    monkeypatch.setattr("worker.engine.devices.has_fast_bf16", lambda _: True)
    years, bench = {"refund": 2013.0, "delivery": 2015.0, "login": 2017.0}, Bench(tmp_path).lay()
    for path in (bench.inputs / "data").iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({"text": r["text"], "score": years[r["label"]]}) + "\n" for r in rows))
    spec = make_spec([{"kind": "finetune", **FAST}], task={"kind": "text_regression", "value": "score"})
    with bench.surround(spec, labels=["score"]) as ctx:
        validation = make_trainer(ctx, ctx.order.stage).run()["validation"]  # type: ignore[arg-type]
    assert validation["rmse"] < 0.5 * np.std([*years.values()])
