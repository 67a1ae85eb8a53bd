"""Zeros among a student's weights: which, and that they stay."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call
from torch.nn.utils import prune as torch_prune
from transformers import AutoModelForCausalLM
from transformers import AutoModelForSequenceClassification as Classifier
from transformers.pytorch_utils import Conv1D

from core.errors import SpecInvalid
from core.jobs.spec import load_spec
from core.models.facts import read_facts
from core.models.safetensors_header import read_tensors
from core.training import GrowingZeros
from tests.engine_bench import FAST, Bench, contents, make_spec
from tests.unit.test_engine_models import CONFIGS, make
from worker.engine.blocks import Blocks, read_stream
from worker.engine.loading import load_language_model, load_tokenizer
from worker.engine.zeros import Growth

TASK = {"kind": "causal_lm", "block_tokens": 32}
SPEC: dict[str, Any] = {"teacher": {"model": "m"}, "student": {"kind": "teacher_layers", "keep": [0]}, "data": "d"}


def matrices(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns the weights of the layers' linear maps, a row for each output."""
    stack = next(name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
    return {
        name: module.weight.T if isinstance(module, Conv1D) else module.weight
        for name, module in model.named_modules()
        if name.startswith(f"{stack}.") and isinstance(module, torch.nn.Linear | Conv1D)
    }


def run(root: Path, **settings: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """Returns matrices of a language model before and after, and the stage's summary."""
    bench = Bench(root).lay_language()
    student = {"kind": "teacher_layers", "keep": [0, 1, 2]}
    done = bench.succeed(make_spec([{"kind": "sparsify", **settings}], task=TASK, student=student), labels=[])
    models = [
        AutoModelForCausalLM.from_pretrained(folder) for folder in (bench.inputs / "teacher", done.outputs / "student")
    ]
    before, after = map(matrices, models)
    return before, after, done.last["summary"]


@pytest.mark.parametrize(
    "settings",
    [
        {"method": {"kind": "magnitude"}},
        {"method": {"kind": "wanda"}},
        {"method": {"kind": "sparsegpt"}},
        {"method": {"kind": "sparsegpt"}, "pattern": "2:4"},
        {"method": {"kind": "wanda"}, "pattern": "4:8"},
    ],
    ids=str,
)
def test_half_of_the_weights_are_zero(settings: dict[str, Any], tmp_path: Path) -> None:
    before, after, summary = run(tmp_path, **settings)
    assert summary["zeros"] == pytest.approx(0.5, abs=0.002)
    assert summary["compressed_bytes"] < 0.85 * summary["stored_bytes"]
    for name, weight_OI in after.items():
        assert (weight_OI == 0).float().mean() == pytest.approx(0.5, abs=0.01)
        if "pattern" in settings:
            n, m = map(int, settings["pattern"].split(":"))
            assert ((weight_OI != 0).reshape(-1, m).sum(1) == n).all()
        if settings["method"]["kind"] != "sparsegpt":
            assert torch.equal(weight_OI[weight_OI != 0], before[name][weight_OI != 0])


def test_groups_of_a_pattern_are_chosen_one_by_one_in_blocks_of_any_size(tmp_path: Path) -> None:
    found = [
        run(tmp_path / str(block), pattern="2:4", method={"kind": "sparsegpt", "block": block})[1] for block in (4, 128)
    ]
    for name, weight_OI in found[0].items():
        assert torch.equal(weight_OI == 0, found[1][name] == 0)
        torch.testing.assert_close(weight_OI, found[1][name], rtol=1e-4, atol=1e-5)


def test_over_all_layers_the_smallest_are_those_of_torch(tmp_path: Path) -> None:
    before, after, _ = run(tmp_path, method={"kind": "magnitude"}, scope="global", share=0.3)
    layers = {name: torch.nn.Linear(*weight.T.shape, bias=False) for name, weight in before.items()}
    for name, layer in layers.items():
        layer.weight.data = before[name].detach().clone(memory_format=torch.contiguous_format)
    pairs = [(layer, "weight") for layer in layers.values()]
    torch_prune.global_unstructured(pairs, pruning_method=torch_prune.L1Unstructured, amount=0.3)
    for name, layer in layers.items():
        assert torch.equal(after[name] != 0, layer.weight_mask.bool())


def test_wanda_compares_the_weights_of_a_row_by_what_they_hear(tmp_path: Path) -> None:
    """In the first layer, whose inputs no pruning has changed; by what the paper says, on a sample's own tokens."""
    before, after, _ = run(tmp_path, method={"kind": "wanda"})
    bench = Bench(tmp_path)
    model, tokenizer = load_language_model(bench.inputs / "teacher"), load_tokenizer(bench.inputs / "teacher")
    ids, learned = read_stream(bench.inputs / "data" / "train.jsonl", {"text": "text"}, tokenizer, is_chat=False)
    split = Blocks(ids, learned, 32)  # not so many that some would be left out
    name, heard = "transformer.h.0.attn.c_attn", []
    model.get_submodule(name).register_forward_hook(lambda _, inputs, __: heard.append(inputs[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in split.in_order(torch.device("cpu")):
            model(input_ids=batch.inputs["input_ids"][batch.is_there][None])
    scores_OI = before[name].abs() * torch.cat(heard).norm(dim=0)
    kept_OK = scores_OI.topk(scores_OI.shape[1] // 2, dim=1).indices
    mask_OI = torch.zeros_like(scores_OI, dtype=torch.bool).scatter(1, kept_OK, value=True)
    assert torch.equal(after[name] != 0, mask_OI)


def test_training_leaves_the_zeros(tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay()
    stages = [
        {"kind": "finetune", **FAST},
        {"kind": "distill", **FAST},
        {"kind": "sparsify", "share": 0.6},
        {"kind": "distill", **FAST, "average": 0.9},
        {"kind": "finetune", "of": "student", "epochs": 1},
    ]
    done = bench.succeed_all(make_spec(stages))
    found = [load_file(one.outputs / "student" / "model.safetensors") for one in done[2:]]
    names = list(matrices(Classifier.from_pretrained(done[2].outputs / "student")))
    for name in names:
        zeros = [weights[f"{name}.weight"] == 0 for weights in found]
        assert zeros[0].float().mean() > 0.55
        assert all(torch.equal(zeros[0], later) for later in zeros[1:])
        assert not torch.equal(found[0][f"{name}.weight"], found[1][f"{name}.weight"])
    lost, regained = (done[index].last["summary"]["validation"]["loss"] for index in (2, 3))
    assert regained < lost


def test_weights_that_were_rounded_to_zero_are_trained(tmp_path: Path) -> None:
    """And the zeros that were chosen before stay, also in the training after that."""
    bench, num_back = Bench(tmp_path).lay(), 0
    stages = [
        {"kind": "finetune", **FAST},
        {"kind": "sparsify", "share": 0.2, "method": {"kind": "magnitude"}},
        {"kind": "quantize", "bits": 2, "group": 16, "method": {"kind": "rtn"}},
        {"kind": "distill", **FAST},
        {"kind": "finetune", "of": "student", **FAST, "epochs": 2},
    ]
    done = bench.succeed_all(make_spec(stages))
    sparse, rounded, *trained = (load_file(one.outputs / "student" / "model.safetensors") for one in done[1:])
    for name in (f"{name}.weight" for name in matrices(Classifier.from_pretrained(done[1].outputs / "student"))):
        chosen, is_rounded = sparse[name] == 0, rounded[name] == 0
        assert is_rounded[~chosen].any()
        assert all((weights[name][chosen] == 0).all() for weights in trained)
        num_back += int((trained[-1][name][is_rounded & ~chosen] != 0).sum())
    assert num_back > 0


@pytest.mark.parametrize(
    ("settings", "field", "words"),
    [
        ({"pattern": "4:4"}, "pattern", "keeps none or all"),
        ({"pattern": "0:4"}, "pattern", "keeps none or all"),
        ({"pattern": "two"}, "pattern", "should match"),
        ({"pattern": "2:4", "scope": "row"}, "scope", "leave scope out"),
        ({"scope": "global"}, "scope", "compares weights of one matrix"),
        ({"share": 1.0}, "share", "less than 1"),
        ({"share": 0.0}, "share", "greater than 0"),
    ],
)
def test_what_makes_no_sense_is_said_at_submit(settings: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(SpecInvalid) as caught:
        load_spec(SPEC | {"stages": [{"kind": "sparsify", **settings}]})
    [detail] = caught.value.details
    assert detail["field"] == f"stages.0.{field}"
    assert words in detail["message"]


def test_groups_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay()
    finished = bench.run(make_spec([{"kind": "sparsify", "pattern": "3:7"}]))
    assert finished.last["type"] == "error"
    assert "do not divide the 32 inputs" in finished.last["message"]


@pytest.mark.parametrize("schedule", ["cubic", "linear"])
@pytest.mark.parametrize(
    ("begin", "end", "every", "num_steps"), [(0.1, 0.7, 7, 100), (0.0, 1.0, 1, 12), (0.5, 0.6, 3, 1)]
)
def test_the_share_rises_as_in_the_paper(schedule: Any, begin: float, end: float, every: int, num_steps: int) -> None:
    """At t0, t0 + Δt, … the share is s_f + (s_i - s_f)(1 - (t - t0)/(nΔt))³, with s_i = 0, and in the end s_f."""
    settings = GrowingZeros(schedule=schedule, begin=begin, end=end, every=every)
    due = [step for step in range(num_steps) if settings.is_due(step, num_steps)]
    first, last = round(begin * num_steps), min(round(end * num_steps), num_steps - 1)
    assert due == sorted({*range(first + every, last, every), last})
    power, final = {"cubic": 3, "linear": 1}[schedule], 0.8
    for step in due[:-1]:
        expected = final + (0 - final) * (1 - (step - first) / (last - first)) ** power
        assert final * settings.grown(step, num_steps) == pytest.approx(expected)
    assert settings.grown(last, num_steps) == 1
    assert settings.last(num_steps) == last


def masks(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name.partition(".parametrizations")[0]: x for name, x in model.named_buffers() if name.endswith("0.mask")}


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[-1]], ids=lambda config: config.model_type)
@pytest.mark.parametrize("sizes", [{"share": 0.37}, {"pattern": "2:8"}], ids=str)
def test_masks_by_magnitude_are_those_of_torch(config: Any, sizes: dict[str, Any]) -> None:
    """Half the way, and in the end; of a pattern those of each group are."""
    model, before = make(config), {name: weight.detach().clone() for name, weight in matrices(make(config)).items()}
    growth = Growth(model, GrowingZeros(begin=0.0, end=0.9, every=5, schedule="linear", **sizes), 10)
    for step, grown in ((5, 5 / 9), (9, 1.0)):
        growth.apply(step)
        found = masks(model)
        assert found.keys() == before.keys()
        for name, weight_OI in [*before.items()][:3]:
            rows = weight_OI.reshape(-1, 8) if "pattern" in sizes else weight_OI.reshape(1, -1)
            num_gone = round(grown * 6) if "pattern" in sizes else round(grown * 0.37 * rows.numel())
            layers = [torch.nn.Linear(len(row), 1, bias=False) for row in rows]
            for layer, row in zip(layers, rows, strict=True):
                layer.weight.data = row[None].clone()
                torch_prune.l1_unstructured(layer, "weight", amount=num_gone)
            expected_OI = torch.cat([layer.weight_mask for layer in layers]).reshape(weight_OI.shape).bool()
            is_turned = config.model_type == "gpt2"
            assert torch.equal(found[name].T if is_turned else found[name], expected_OI)
    growth.settle()
    assert model.config.keeps_zeros
    for name, weight_OI in matrices(model).items():
        mask_OI = found[name].T if config.model_type == "gpt2" else found[name]
        assert torch.equal(weight_OI, torch.where(mask_OI, before[name], 0))


@pytest.mark.parametrize("method", ["movement", "magnitude"])
def test_some_steps_are_those_that_the_papers_describe(method: Any) -> None:
    """By hand: a' = (W ⊙ M)x; S falls by W · ∂L/∂(W ⊙ M); what is masked is not updated, but may come back."""
    torch.manual_seed(0)
    model, other = make(CONFIGS[0]).double(), make(CONFIGS[0]).double()
    growth = Growth(model, GrowingZeros(share=0.5, begin=0.0, end=0.9, every=1, method=method), 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1, momentum=0.9)
    names = [f"{name}.weight" for name in matrices(other)]
    weights = {name: x.detach().clone() for name, x in other.named_parameters()}
    moved = {name: torch.zeros_like(weights[name]) for name in names}
    kept = {name: torch.ones_like(weights[name], dtype=torch.bool) for name in names}
    speeds, num_back = {name: torch.zeros_like(x) for name, x in weights.items()}, 0
    for step in range(8):
        inputs = {"input_ids": torch.randint(4, 60, (4, 9)), "labels": torch.randint(0, 3, (4,))}
        growth.apply(step)
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        growth.hear()
        optimizer.step()
        growth.hold()

        final = min(round(0.9 * 8), 7)
        share = 0.5 * (1 - (1 - step / final) ** 3)
        for name in names if step else ():
            score = moved[name] if method == "movement" else weights[name].abs()
            gone = score.flatten().sort().indices[: round(share * score.numel())]
            mask = torch.ones(score.numel(), dtype=torch.bool)
            mask[gone] = False
            num_back += int((mask.view_as(score) & ~kept[name]).sum())
            kept[name] = mask.view_as(score)
        seen = {name: (x * kept[name] if name in kept else x).requires_grad_() for name, x in weights.items()}
        loss = functional_call(other, seen, (), inputs).loss
        gradients = dict(zip(seen, torch.autograd.grad(loss, [*seen.values()]), strict=True))
        for name, gradient in gradients.items():
            weight = weights[name].detach()
            if name in moved:
                moved[name] = moved[name] - weight * gradient
            speeds[name] = 0.9 * speeds[name] + gradient * kept.get(name, 1) + 0.1 * weight
            updated = weight - 0.1 * speeds[name]
            weights[name] = torch.where(kept[name], updated, weight) if name in kept else updated
    found = {name.replace("parametrizations.weight.original", "weight"): x for name, x in model.named_parameters()}
    for name, weight in weights.items():
        torch.testing.assert_close(found[name].detach(), weight, rtol=1e-7, atol=1e-10)
    for name in names:
        assert torch.equal(masks(model)[name.removesuffix(".weight")], kept[name])
    assert num_back > 0


SHORT = FAST | {"epochs": 3, "learning_rate": 1e-4, "batch_size": 16}
GROWING: dict[str, dict[str, Any]] = {
    "movement": {
        "kind": "finetune",
        **SHORT,
        "average": 0.5,
        "sparsity": {"share": 0.97, "method": "movement", "schedule": "linear", "end": 0.95, "every": 1},
    },
    "magnitude": {
        "kind": "distill",
        **SHORT,
        "micro_batch_size": 5,
        "sparsity": {"pattern": "2:4", "begin": 0.0, "end": 0.5, "every": 2},
    },
}


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A job whose teacher has learned its task."""
    bench = Bench(tmp_path_factory.mktemp("learned")).lay()
    bench.succeed_all(make_spec([{"kind": "finetune", **FAST}]))
    return bench


@pytest.mark.parametrize("method", GROWING)
def test_zeros_grow_and_stay_and_a_kill_changes_nothing(learned: Bench, method: str, tmp_path: Path) -> None:
    """Also where an epoch with fewer zeros was better: those that are wanted are there in the end."""
    bench, stage = learned.copy(tmp_path / "bench"), GROWING[method]
    role = {"finetune": "teacher", "distill": "student"}[stage["kind"]]
    spec = make_spec([stage, {"kind": "finetune", "of": role, "epochs": 1}])
    again, whole = bench.copy(tmp_path / "again"), bench.succeed(spec)
    checkpoint = None
    for how in ("kill", "stop"):
        order = again.write_order(spec, 0, how, checkpoint=checkpoint and str(checkpoint), checkpoint_s=0)
        found, _ = again.interrupt(order, 4, how)
        checkpoint = found[-1]
    resumed = again.succeed(spec, 0, "last", checkpoint=str(checkpoint))
    assert contents(resumed.outputs) == contents(whole.outputs)
    shares = [share for _, share in whole.series("zeros")]
    assert shares == sorted(shares)
    assert len({*shares}) > 2
    model = Classifier.from_pretrained(whole.outputs / role)
    assert model.config.keeps_zeros
    for weight_OI in matrices(model).values():
        if method == "magnitude":
            assert ((weight_OI != 0).reshape(-1, 4).sum(1) == 2).all()
        else:
            assert int((weight_OI == 0).sum()) == round(0.97 * weight_OI.numel())
    summary = whole.last["summary"]
    assert summary["zeros"] == pytest.approx(0.5 if method == "magnitude" else 0.97, abs=1e-3)
    found, accuracies = summary["validation"]["accuracy"], [value for _, value in whole.series("validation/accuracy")]
    assert found > 0.9 if method == "magnitude" else found < 0.9 < max(accuracies)
    bench.adopt(whole, 0, stage["kind"])
    later = matrices(Classifier.from_pretrained(bench.succeed(spec, 1).outputs / role))
    for name, weight_OI in matrices(model).items():
        assert torch.equal(later[name] == 0, weight_OI == 0)
        assert not torch.equal(later[name], weight_OI)


LORA = {"kind": "lora"}
SPARSE: dict[str, Any] = {"kind": "distill", "sparsity": {}}


@pytest.mark.parametrize(
    ("stages", "field", "words"),
    [
        ([{"kind": "quantize"}, SPARSE], "1.sparsity", "'quantize' has chosen single weights"),
        ([{"kind": "sparsify"}, SPARSE], "1.sparsity", "'sparsify' has chosen single weights"),
        ([SPARSE, {**SPARSE}], "1.sparsity", "'distill' has chosen single weights"),
        ([{"kind": "finetune", "sparsity": {}}, SPARSE], "1.sparsity", "'finetune' has chosen single weights"),
        ([SPARSE, {"kind": "finetune", "of": "student", "adapter": LORA}], "1.adapter", "an adapter changes all"),
        ([{**SPARSE, "adapter": LORA}], "0.sparsity", "an adapter changes all weights"),
        (
            [{**SPARSE, "sparsity": {"method": "movement"}, "freeze": {"layers": 1}}],
            "0.sparsity.method",
            "frozen layers do not move",
        ),
        ([{**SPARSE, "sparsity": {"begin": 0.5, "end": 0.5}}], "0.sparsity", "begin must be less than end"),
        ([{**SPARSE, "sparsity": {"pattern": "4:4"}}], "0.sparsity.pattern", "keeps none or all"),
        ([{**SPARSE, "sparsity": {"share": 1.0}}], "0.sparsity.share", "less than 1"),
        ([{**SPARSE, "sparsity": {"schedul": "linear"}}], "0.sparsity.schedul", "did you mean 'schedule'"),
    ],
)
def test_growing_zeros_that_make_no_sense_are_refused_at_submit(
    stages: list[dict[str, Any]], field: str, words: str
) -> None:
    with pytest.raises(SpecInvalid) as caught:
        load_spec(SPEC | {"stages": stages})
    [detail] = caught.value.details
    assert (detail["field"], words in detail["message"]) == (f"stages.{field}", True)


def test_growing_zeros_that_no_search_can_use_are_refused() -> None:
    with pytest.raises(SpecInvalid, match="zeros make no form smaller"):
        load_spec(
            SPEC
            | {"student": {"kind": "searched"}, "stages": [{"kind": "search", "distill": {"sparsity": {"share": 0.5}}}]}
        )


def test_groups_of_growing_zeros_must_divide(tmp_path: Path) -> None:
    """At submit where the widths are known, and else when the stage starts, as does a model with zeros of its own."""
    bench, sevenths = Bench(tmp_path).lay(), {"pattern": "3:7"}
    folder = bench.inputs / "teacher"
    config = json.loads((folder / "config.json").read_text())
    facts = read_facts(config, tensors=read_tensors(folder / "model.safetensors"))
    for stage in ({"kind": "finetune", "sparsity": sevenths}, {"kind": "distill", "sparsity": sevenths}):
        spec = load_spec(SPEC | {"stages": [stage]})
        [problem] = spec.stages[0].check_model(spec, facts)
        assert problem.field == "sparsity.pattern"
        assert "groups of 7 do not divide the 32 inputs" in problem.message
    last = bench.run(make_spec([{"kind": "finetune", "sparsity": sevenths}])).last
    assert (last["reason"], "do not divide the 32 inputs" in last["message"]) == ("spec_invalid", True)
    (folder / "config.json").write_text(json.dumps(config | {"keeps_zeros": True}))
    last = bench.run(make_spec([{"kind": "finetune", "sparsity": {}}]), 0, "zeros").last
    assert (last["reason"], "has zeros already" in last["message"]) == ("spec_invalid", True)


@pytest.mark.parametrize(
    ("stage", "field"),
    [
        ({"kind": "sparsify", "share": 0.99}, "share"),  # by row: 32 weights
        ({"kind": "sparsify", "share": 0.9999, "method": {"kind": "magnitude"}}, "share"),
        ({"kind": "finetune", "sparsity": {"share": 0.9999}}, "sparsity.share"),
    ],
)
def test_a_share_that_leaves_nothing_is_refused_at_submit(tmp_path: Path, stage: dict[str, Any], field: str) -> None:
    folder = Bench(tmp_path).lay().inputs / "teacher"
    config = json.loads((folder / "config.json").read_text())
    spec = load_spec(SPEC | {"stages": [stage]})
    [problem] = spec.stages[0].check_model(spec, read_facts(config))
    assert (problem.field, "leaves none of the" in problem.message) == (field, True)
    most = float(problem.message.rsplit(" ", 1)[1])
    inner = {"share": most} if field == "share" else {"sparsity": {"share": most}}
    again = load_spec(SPEC | {"stages": [stage | inner]})
    assert again.stages[0].check_model(again, read_facts(config)) == []


def test_zeros_do_not_grow_with_layers_split(tmp_path: Path) -> None:
    spec = make_spec([{"kind": "finetune", **FAST, "sparsity": {}}])
    last = Bench(tmp_path).lay().run(spec, num_processes=2, shard_layers=True).last
    assert (last["type"], last["reason"], "layers are split" in last["message"]) == ("error", "spec_invalid", True)
