"""Tasks with layers of their own above shared ones: against stock models put together by hand, and in whole jobs."""

import copy
import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)

from app.jobs.resolving import Found, Plan, Sources, describe_models
from app.jobs.service import expect_student
from core.errors import SpecInvalid
from core.jobs.spec import load_spec
from core.models.facts import ModelFacts
from tests import pico
from tests.engine_bench import Bench, Finished, contents, make_spec
from tests.unit.test_engine_multitask import LABELS, TEXTS, WORDS, as_task, labels_of, lay
from worker.engine.branches import branch
from worker.engine.loading import find_layers, is_head, load_classifier, name_labels, save_classifier
from worker.engine.measuring import count_bytes
from worker.engine.optimization import make_optimizer
from worker.engine.task_views import OneHead
from worker.engine.tasks import TaskHead
from worker.kernels.precision import has_fast_bf16

TASKS = {name: TEXTS[name] for name in ("intent", "payment", "size")}
COLUMNS = {"intent": slice(0, 3), "payment": slice(3, 5), "size": slice(5, 6)}
FAST = {"epochs": 3, "learning_rate": 3e-3, "head_learning_rate": 1e-2, "batch_size": 16}
BASE = {"kind": "pretrained", "model": "small"}
TEXT = "please my parcel is late"
SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
WIDER = SIZES | {"intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0}
ARCHITECTURES: dict[str, tuple[PreTrainedConfig, str, list[str]]] = {  # its layers, and all that comes before them
    "bert": (BertConfig(**WIDER), "bert.encoder.layer", ["bert.embeddings"]),
    "distilbert": (
        DistilBertConfig(vocab_size=40, dim=32, hidden_dim=48, n_layers=3, n_heads=2, max_position_embeddings=64),
        "distilbert.transformer.layer",
        ["distilbert.embeddings"],
    ),
    "modernbert": (
        ModernBertConfig(**WIDER, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
        "model.layers",
        ["model.embeddings"],
    ),
    "roberta": (RobertaConfig(**WIDER), "roberta.encoder.layer", ["roberta.embeddings"]),
    "electra": (
        ElectraConfig(**WIDER, embedding_size=16),
        "electra.encoder.layer",
        ["electra.embeddings", "electra.embeddings_project"],
    ),
    "deberta-v2": (
        DebertaV2Config(**WIDER, relative_attention=True, norm_rel_ebd="layer_norm", pos_att_type=["c2p", "p2c"]),
        "deberta.encoder.layer",
        ["deberta.embeddings", "deberta.encoder.rel_embeddings", "deberta.encoder.LayerNorm"],
    ),
    "gpt2": (
        GPT2Config(vocab_size=40, n_embd=32, n_layer=3, n_head=2, n_positions=64, pad_token_id=0),
        "transformer.h",
        ["transformer.wte", "transformer.wpe"],
    ),
}


def make_branched(architecture: str, num_shared: int, **sizes: int) -> tuple[PreTrainedModel, dict[str, OneHead]]:
    """Returns a model over the labels of all tasks, and how each sees it; at first all have the same layers."""
    torch.manual_seed(0)
    config = copy.deepcopy(ARCHITECTURES[architecture][0])
    config.update({"num_labels": 6, **sizes})
    model = AutoModelForSequenceClassification.from_config(config)
    name_labels(model, labels_of(TASKS))
    heads = {name: TaskHead(name, columns, of_first_token=False) for name, columns in COLUMNS.items()}
    spec = SimpleNamespace(task=SimpleNamespace(shared_layers=num_shared))
    branch(cast("Any", SimpleNamespace(spec=spec, task=SimpleNamespace(heads=heads))), model)
    return model.eval(), {name: OneHead(model, head) for name, head in heads.items()}


def put_together(folder: Path, task: str) -> PreTrainedModel:
    """Returns a stock model of what is shared and of what a task has, as the files name it."""
    config = AutoConfig.from_pretrained(folder / "base", num_labels=len(LABELS[task]))
    model = AutoModelForSequenceClassification.from_config(config)
    parts = [load_file(folder / part / "model.safetensors") for part in ("base", f"branches/{task}")]
    model.load_state_dict(parts[0] | parts[1])  # strictly: each weight once
    return model.eval()


def ids(seed: int, num_texts: int = 4) -> Tensor:
    return torch.randint(3, 40, (num_texts, 7), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_shared", [0, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_task_computes_as_the_stock_model_of_its_weights(architecture: str, num_shared: int, tmp_path: Path) -> None:
    """Of three layers all but the last are shared, or none."""
    model, views = make_branched(architecture, num_shared)
    with torch.no_grad():
        for parameter in model.parameters():  # so that tasks are told apart
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokenizer = AutoTokenizer.from_pretrained(pico.write_model(tmp_path / "words"))
    model.config.tasks = dict.fromkeys(TASKS, "single_label_classification")
    save_classifier(model, tokenizer, labels_of(TASKS), folder := tmp_path / "saved")
    assert not (folder / "config.json").exists()
    again = load_classifier(folder, labels_of(TASKS)).eval()
    assert not again.has_new_head
    found, input_ids = [], ids(0)
    for name, columns in COLUMNS.items():
        with torch.no_grad():
            found.append(views[name](input_ids=input_ids).logits)
            torch.testing.assert_close(found[-1], put_together(folder, name)(input_ids=input_ids).logits)
            again.apart.turn(name)
            assert torch.equal(again(input_ids=input_ids).logits[:, columns], found[-1])
            assert torch.equal(model.apart.single(name)(input_ids=input_ids).logits[:, columns], found[-1])
    assert not torch.allclose(found[0][:, :1], found[1][:, :1])
    _, stack, before = ARCHITECTURES[architecture]
    expected = tuple(f"{name}." for name in [*before, *(f"{stack}.{layer}" for layer in range(num_shared))])
    shared = load_file(folder / "base" / "model.safetensors")
    assert all(name.startswith(expected) for name in shared)
    assert not any(name.startswith(expected) for name in load_file(folder / "branches" / "size" / "model.safetensors"))
    save_classifier(again, tokenizer, labels_of(TASKS), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


def test_the_only_layer_of_a_student_can_be_a_tasks_own() -> None:
    model, _ = make_branched("bert", 0, num_hidden_layers=1)
    assert find_layers(model) == ("bert.encoder.layer", 1)


def test_steps_are_those_of_models_that_hold_the_same_modules(tmp_path: Path) -> None:
    """A stock model a task, with embeddings and first layer in common, is trained by stock AdamW beside ours."""
    model, views = make_branched("bert", 1)
    tokenizer = AutoTokenizer.from_pretrained(pico.write_model(tmp_path / "words"))
    save_classifier(model, tokenizer, labels_of(TASKS), tmp_path / "before")
    alone = {name: put_together(tmp_path / "before", name) for name in TASKS}
    first = alone["intent"].bert
    for other in alone.values():
        other.bert.embeddings, other.bert.encoder.layer[0] = first.embeddings, first.encoder.layer[0]
    stage = {"kind": "finetune", "learning_rate": 1e-2, "layer_decay": 0.5, "weight_decay": 0.1}
    settings = cast("Any", load_spec(make_spec([stage])).stages[0])
    ours = make_optimizer(model, settings, is_head)
    rates = {"bert.encoder.layer.2.": 1e-2, "bert.encoder.layer.1.": 5e-3, "bert.encoder.layer.0.": 2.5e-3}
    rates |= {"bert.embeddings.": 1.25e-3, "bert.pooler.": 2e-3, "classifier.": 2e-3}
    named = {id(x): (name, x) for single in alone.values() for name, x in single.named_parameters()}
    theirs = torch.optim.AdamW(
        {"params": [x], "lr": lr, "weight_decay": 0.1 if x.ndim > 1 else 0.0}
        for name, x in named.values()
        for start, lr in rates.items()
        if name.startswith(start)
    )
    kept: dict[str, dict[str, Tensor]] = {}
    for step, name in enumerate(["intent", "size", "payment", "size", "size", "size", "intent"]):
        before = {task: {k: x.clone() for k, x in model.apart.weights_of(task).items()} for task in TASKS}
        for see, optimizer in ((views[name], ours), (alone[name], theirs)):
            optimizer.zero_grad(set_to_none=True)
            see(input_ids=ids(step)).logits.square().sum().backward()
            optimizer.step()
        kept = {task: model.apart.weights_of(task) for task in TASKS}
        for task in TASKS:
            assert all(torch.equal(x, kept[task][k]) == (task != name) for k, x in before[task].items()), (step, task)
    shared = load_file(tmp_path / "before" / "base" / "model.safetensors")
    for name, single in alone.items():
        state = single.state_dict()
        for key, tensor in kept[name].items():
            torch.testing.assert_close(tensor, state[key], atol=1e-5, rtol=1e-4)
        for key, tensor in shared.items():
            torch.testing.assert_close(model.state_dict()[key], state[key], atol=1e-5, rtol=1e-4)
            assert not torch.equal(state[key], tensor)


def of_tasks(tasks: dict[str, Any], shared: Any, stages: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    task = as_task(tasks, shared=shared)
    whole = {"task": task, "data": dict.fromkeys(tasks, "toy"), "student": {"kind": "teacher_layers", "keep": [0, 2]}}
    return make_spec(stages, **(whole | changes))


FORM = {"kind": "export", "formats": [{"kind": "single_tasks"}]}
MEASURE = {"kind": "evaluate", "latency_samples": 10}


@pytest.fixture(scope="module", params=["embeddings", 1])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, list[Finished]]:
    """A teacher that shares all, and a student of two of its layers, trained twice."""
    bench = lay(tmp_path_factory.mktemp("tasks"), TASKS)
    stages = [
        {"kind": "finetune", **FAST},
        {"kind": "distill", **FAST, "average": 0.9},
        {"kind": "finetune", "of": "student", **FAST, "epochs": 1, "freeze": {"layers": 1}},
        FORM,
        MEASURE,
    ]
    return bench, bench.succeed_all(of_tasks(TASKS, request.param, stages), labels=labels_of(TASKS))


def test_a_job_learns_tasks_with_layers_of_their_own(trained: tuple[Bench, list[Finished]]) -> None:
    bench, done = trained
    assert (done[0].outputs / "teacher" / "config.json").exists()  # of one model, as ever
    rows = {row["name"]: row for row in done[-1].last["summary"]["models"]}
    assert [*rows] == ["teacher", "student"]
    row = rows["student"]
    shares = [row["tasks"]["intent"]["accuracy"], row["tasks"]["payment"]["accuracy"], row["tasks"]["size"]["pearson"]]
    assert min(shares) > 0.9
    assert row["agreement"] > 0.9
    folder = bench.inputs / "student"
    names, counts = {}, {}
    for path in ("base", *(f"branches/{name}" for name in TASKS)):
        with safe_open(folder / path / "model.safetensors", framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        names[path], counts[path] = set(shapes), sum(torch.Size(shape).numel() for shape in shapes.values())
    assert all(names["base"].isdisjoint(own) for path, own in names.items() if path != "base")
    assert sum(counts.values()) == row["num_parameters"]
    assert 4 * row["num_parameters"] < row["size_bytes"] == count_bytes(folder)
    assert count_bytes(folder) < count_bytes(bench.inputs / "single_tasks")
    own = [load_file(folder / "branches" / name / "model.safetensors") for name in TASKS]
    key = "bert.encoder.layer.1.output.dense.bias"
    assert not any(torch.equal(one[key], other[key]) for one, other in itertools.combinations(own, 2))
    paths = [found.outputs / "student" / "base" / "model.safetensors" for found in done[1:3]]
    before, frozen = map(load_file, paths)
    still = [name for name, x in frozen.items() if torch.equal(x, before[name])]
    assert still == [*before]  # embeddings and the first layer, which one of the two students shares


def test_stock_models_of_a_task_say_the_same(trained: tuple[Bench, list[Finished]]) -> None:
    bench, _ = trained
    ours = load_classifier(bench.inputs / "student", labels_of(TASKS)).eval()
    inputs = AutoTokenizer.from_pretrained(bench.inputs / "student")(TEXT, return_tensors="pt")
    for name, columns in COLUMNS.items():
        single = AutoModelForSequenceClassification.from_pretrained(bench.inputs / "single_tasks" / name).eval()
        assert [*single.config.id2label.values()] == LABELS[name]
        assert not hasattr(single.config, "tasks")
        ours.apart.turn(name)
        with torch.no_grad():
            found = ours(**inputs).logits[:, columns]
            torch.testing.assert_close(single(**inputs).logits, found, atol=1e-5, rtol=0)


def test_words_and_texts_learn_from_layers_of_a_teacher(tmp_path: Path) -> None:
    bench = lay(tmp_path, WORDS)
    stages = [
        {"kind": "finetune", **FAST, "epochs": 6},
        {"kind": "distill", **FAST, "losses": [{"kind": "forward_kl"}, {"kind": "hidden_mse"}, {"kind": "relations"}]},
        FORM,
        MEASURE,
    ]
    done = bench.succeed_all(of_tasks(WORDS, 1, stages), labels=labels_of(WORDS))
    for row in done[-1].last["summary"]["models"]:
        assert row["tasks"]["entities"]["f1"] > 0.9
        assert row["tasks"]["intent"]["accuracy"] > 0.9
    tagger = AutoModelForTokenClassification.from_pretrained(bench.inputs / "single_tasks" / "entities")
    assert [*tagger.config.id2label.values()] == LABELS["entities"]


def test_a_teacher_for_each_task(tmp_path: Path) -> None:
    tasks = {name: TEXTS[name] for name in ("intent", "size")}
    bench = lay(tmp_path / "both", tasks)
    for number, name in enumerate(sorted(tasks), 1):
        alone = Bench(tmp_path / name)
        (alone.inputs / "data").mkdir(parents=True)
        shutil.copytree(bench.inputs / "teacher", alone.inputs / "teacher")
        for split in ("train", "validation"):
            shutil.copyfile(bench.inputs / "data" / split / f"{name}.jsonl", alone.inputs / "data" / f"{split}.jsonl")
        made = alone.succeed(make_spec([{"kind": "finetune", **FAST}], task=tasks[name]), labels=LABELS[name])
        shutil.copytree(made.outputs / "teacher", bench.inputs / f"teacher_{number}")
    (bench.inputs / "teacher").rename(bench.inputs / "base")
    stages = [
        {"kind": "answer", "splits": ["train", "validation", "test"]},
        {"kind": "distill", **FAST, "epochs": 8},
        MEASURE,
    ]
    teacher = {"kind": "per_task", "models": {"intent": "sharp", "size": "wide"}}
    spec = of_tasks(tasks, "embeddings", stages, teacher=teacher, student=BASE)
    done = bench.succeed_all(spec, labels=labels_of(tasks))
    rows = {row["name"]: row for row in done[-1].last["summary"]["models"]}
    assert rows["student"]["agreement"] > 0.85


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_run_that_was_interrupted_ends_with_the_same_bytes(tmp_path: Path, how: str) -> None:
    bench = lay(tmp_path, TASKS)
    settings = {**FAST, "epochs": 2, "batch_size": 60, "average": 0.9, "layer_decay": 0.8, "dropout": 0.1}
    spec = of_tasks(TASKS, 1, [{"kind": "distill", **settings, "freeze": {"layers": 1, "epochs": 1}}])
    labels = labels_of(TASKS)
    whole = bench.succeed(spec, 0, "whole", labels=labels, checkpoint_s=0)
    found, _ = bench.interrupt(bench.write_order(spec, 0, "cut", labels=labels, checkpoint_s=0), 12, how)
    again = bench.succeed(spec, 0, "again", labels=labels, checkpoint=str(found[-1]))
    assert "going on from step" in again.log
    assert contents(again.outputs) == contents(whole.outputs)


@pytest.mark.parametrize("shard_layers", [False, True])
def test_two_processes_learn_the_layers_that_one_does(tmp_path: Path, shard_layers: bool) -> None:
    bench = lay(tmp_path, TASKS)
    gently = {"epochs": 1, "learning_rate": 1e-4, "head_learning_rate": 1e-3, "batch_size": 60, "dropout": 0.0}
    spec = of_tasks(TASKS, 1, [{"kind": "finetune", "of": "student", **gently}])
    one, two = (
        bench.succeed(spec, 0, str(n), labels=labels_of(TASKS), num_processes=n, shard_layers=shard_layers)
        for n in (1, 2)
    )
    assert contents(two.outputs).keys() == contents(one.outputs).keys()
    close = []
    for path in one.outputs.rglob("model.safetensors"):
        found, expected = load_file(two.outputs / path.relative_to(one.outputs)), load_file(path)
        for name, tensor in expected.items():
            close.append(torch.isclose(found[name], tensor, atol=2e-4, rtol=2e-2).flatten())
    least = 0.999 if has_fast_bf16("cpu") else 1.0  # in half precision a gradient near zero may get another sign
    assert torch.cat(close).double().mean() >= least


def test_zeros_that_a_model_came_with_stay_in_the_layers_of_every_task(tmp_path: Path) -> None:
    bench = lay(tmp_path, TASKS)
    model = AutoModelForSequenceClassification.from_pretrained(bench.inputs / "teacher")
    key = "bert.encoder.layer.2.output.dense.weight"
    with torch.no_grad():
        model.get_parameter(key)[:, ::2] = 0
    model.config.keeps_zeros = True
    shutil.copytree(bench.inputs / "teacher", bench.inputs / "base")
    model.save_pretrained(bench.inputs / "base")
    spec = of_tasks(TASKS, 2, [{"kind": "finetune", "of": "student", **FAST, "epochs": 1}], student=BASE)
    made = bench.succeed(spec, labels=labels_of(TASKS)).outputs / "student" / "branches"
    for name in TASKS:
        weight = load_file(made / name / "model.safetensors")[key]
        assert (weight == 0).nonzero().equal((model.get_parameter(key) == 0).nonzero())


LEARN = {"kind": "finetune", "of": "student"}


@pytest.mark.parametrize(
    ("stages", "changes", "field", "hint"),
    [
        ([{"kind": "finetune"}], {}, "task.shared", "in the student alone, and no stage trains it; add one, or use"),
        ([LEARN | {"adapter": {"kind": "lora"}}], {}, "stages.0.adapter", "set task.shared to 'adapters'"),
        ([LEARN | {"sparsity": {}}], {}, "stages.0.sparsity", "layers that all tasks share; leave it out"),
        ([{"kind": "quantize"}, LEARN], {}, "stages.1.kind", "'quantize' has chosen single weights"),
        ([LEARN, {"kind": "prune", "num_layers": 1}], {}, "stages.0.kind", "stage 1, 'prune', needs the student whole"),
        ([LEARN, {"kind": "distill"}, {"kind": "quantize"}], {}, "stages.1.kind", "stage 2, 'quantize', needs the"),
        ([LEARN, {"kind": "export"}], {}, "stages.1.formats.1", "use 'single_tasks', a model for each"),
        (
            [LEARN],
            {"student": {"kind": "shared_layers"}},
            "task.shared",
            "layers of a 'shared_layers' student are the same",
        ),
        (
            [{"kind": "search", "min_retained": 0.9}],
            {"student": {"kind": "searched"}},
            "stages.0.kind",
            "set task.shared to 'all'",
        ),
        (
            [{"kind": "intermediate", "task": as_task(TASKS, shared=1), "data": dict.fromkeys(TASKS, "toy")}, LEARN],
            {},
            "stages.0.task.shared",
            "only the trunk goes on, so it is shared whole; use 'all'",
        ),
        *(
            ([LEARN], {"task": as_task(TASKS, shared=shared)}, "task.shared", "or how many of the first layers are")
            for shared in ("layers", 0, -1, 1.5, True)
        ),
    ],
)
def test_specs_that_cannot_be(stages: list[dict[str, Any]], changes: dict[str, Any], field: str, hint: str) -> None:
    with pytest.raises(SpecInvalid) as caught:
        of_tasks(TASKS, 1, stages, **changes)
    details = {detail["field"]: detail["message"] for detail in caught.value.details}
    assert hint in details.get(field, ""), details


def test_what_is_left_out_of_a_spec_is_what_can_be() -> None:
    told = {"task": as_task(TASKS, shared=4), "data": dict.fromkeys(TASKS, "toy")}
    spec = load_spec(told | {"teacher": {"model": "big"}, "student": BASE})
    assert [stage.kind for stage in spec.stages] == ["finetune", "distill", "export", "evaluate"]
    assert [form.kind for form in spec.stages[2].forms()] == ["single_tasks"]


@pytest.mark.parametrize(
    ("student", "shared", "is_told"),
    [
        ({"kind": "teacher_layers", "keep": [0, 2, 5]}, 3, True),
        ({"kind": "teacher_layers", "keep": [0, 2, 5]}, 2, False),
        ({"kind": "teacher_layers", "keep": [0]}, "embeddings", False),
        ({"kind": "fresh", "num_layers": 2}, 2, True),
        (BASE, 4, True),
        (BASE, 3, False),
        (BASE, "all", False),
    ],
)
def test_as_many_shared_layers_as_there_are_is_told_at_submit(
    student: dict[str, Any], shared: Any, is_told: bool
) -> None:
    spec = load_spec(of_tasks(TASKS, shared, [{"kind": "distill"}], student=student))
    facts = {role: ModelFacts(model_type="bert", num_layers=n) for role, n in (("teacher", 6), ("base", 4))}
    found = Sources({role: Found({}, facts[role]) for role in spec.models()}, {}, [])
    problems: list[dict[str, Any]] = []
    describe_models(spec, found, problems)
    assert [problem["field"] for problem in problems] == ["task.shared"] * is_told
    assert all("choose fewer, or 'all'" in problem["message"] for problem in problems)


@pytest.mark.parametrize(("shared", "told"), [("all", 100), (1, None)])
def test_how_large_a_student_is_of_which_tasks_have_layers_is_not_told(shared: Any, told: int | None) -> None:
    spec = load_spec(of_tasks(TASKS, shared, [{"kind": "distill"}], student=BASE))
    made = Plan({}, {"base": ModelFacts(model_type="bert", num_layers=3, num_parameters=100)}, [], {})
    assert expect_student(spec, made).num_parameters == told


def test_as_many_as_only_the_stage_knows_of_is_told_by_it(tmp_path: Path) -> None:
    bench = lay(tmp_path, TASKS)
    pico.write_model(bench.inputs / "base", num_layers=1)
    last = bench.run(of_tasks(TASKS, 1, [{"kind": "distill"}], student=BASE), labels=labels_of(TASKS)).last
    assert (last["type"], last["reason"]) == ("error", "spec_invalid")
    assert "task.shared is 1 and the student has 1 layers" in last["message"]
