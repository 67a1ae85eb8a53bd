"""The job spec: short and long forms, and what its errors say."""

import jsonschema
import pytest

from core.errors import SpecInvalid
from core.jobs.spec import JobSpec, load_spec, parse_spec

SHORT = {"teacher": {"model": "acme/minilm"}, "student": {"kind": "teacher_layers", "keep": [0, 2]}, "data": "tickets"}


def problems(data: dict) -> dict[str, str]:
    with pytest.raises(SpecInvalid) as caught:
        load_spec(data)
    return {detail["field"]: detail["message"] for detail in caught.value.details}


def test_one_mistake_is_one_problem() -> None:
    assert problems({**SHORT, "teacher": {"modell": "a"}}) == {
        "teacher.modell": "unknown field 'modell'; did you mean 'model'?"
    }
    assert problems({name: SHORT[name] for name in ("teacher", "student")}) == {"data": "Field required"}


def test_twenty_of_many_problems_are_shown_and_all_counted() -> None:
    teacher = {"kind": "openai", "model": "m", "words": {str(n): n for n in range(5000)}}
    with pytest.raises(SpecInvalid, match="and 4999 more") as caught:
        load_spec({**SHORT, "teacher": teacher})
    assert len(caught.value.details) == 20


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ('{"teacher": {"model": "a\\u0000"}, "data": "d"}', "teacher.model"),
        ('{"stages": [{}, {"kind": "a\\u0000"}]}', "stages.1.kind"),
        ('{"metadata": {"a\\u0000": "b"}}', "metadata"),
        ('metadata: {a: "\\0"}', "metadata.a"),
    ],
)
def test_a_nul_is_named(body: str, field: str) -> None:
    with pytest.raises(SpecInvalid, match="NUL") as caught:
        parse_spec(body.encode())
    assert [detail["field"] for detail in caught.value.details] == [field]


def test_short_spec_gets_the_whole_pipeline() -> None:
    spec = load_spec(SHORT)
    assert [stage.kind for stage in spec.stages] == ["finetune", "distill", "export", "evaluate"]
    assert spec.data.model_dump() == {
        "train": "tickets/train",
        "validation": "tickets/validation",
        "test": "tickets/test",
    }


def test_normalised_spec_is_a_fixed_point() -> None:
    spec = load_spec(SHORT)
    again = load_spec(spec.model_dump(mode="json"))
    assert again == spec
    assert again.digest() == spec.digest()


def test_yaml_and_json_mean_the_same() -> None:
    json_body = b'{"teacher": {"model": "a"}, "student": {"kind": "teacher_layers", "keep": [0]}, "data": "d"}'
    yaml_body = b"teacher: {model: a}\nstudent: {kind: teacher_layers, keep: [0]}\ndata: d\n"
    assert parse_spec(json_body) == parse_spec(yaml_body)


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"studnet": 1}, "studnet", "did you mean 'student'?"),
        ({"student": {"kind": "teacher_layer", "keep": [0]}}, "student.kind", "did you mean 'teacher_layers'?"),
        ({"student": {"keep": [0]}}, "student.kind", "missing"),
        (
            {"data": {"train": "toy/train"}, "stages": [{"kind": "distill", "patience": 2}]},
            "stages.0.patience",
            "set data.validation",
        ),
        (
            {
                "stages": [
                    {"kind": "distill", "reduction": "sum", "losses": [{"kind": "forward_kl"}, {"kind": "hidden_mse"}]}
                ]
            },
            "stages.0.reduction",
            "losses on layers are means",
        ),
        (
            {
                "stages": [
                    {
                        "kind": "distill",
                        "reduction": "sequence_mean",
                        "losses": [{"kind": "forward_kl"}, {"kind": "hidden_mse"}],
                    }
                ]
            },
            "stages.0.reduction",
            "losses on layers are means",
        ),
        (
            {"data": {"train": "toy/train"}, "stages": [{"kind": "trim_vocabulary", "splits": ["validation"]}]},
            "stages.0.splits",
            "the job has no validation split",
        ),
        (
            {"stages": [{"kind": "sparsify", "pattern": "1:3", "method": {"kind": "sparsegpt"}}]},
            "stages.0.method.block",
            "groups of 3 do not divide 128",
        ),
        (
            {"student": {"kind": "fresh", "num_layers": 1}, "stages": [{"kind": "finetune"}, {"kind": "export"}]},
            "stages.1.kind",
            "the student has learned nothing yet",
        ),
        ({"student": {"kind": "teacher_layers", "kep": [0]}}, "student.kep", "did you mean 'keep'?"),
        ({"stages": [{"kind": "finetune", "epochs": -1}]}, "stages.0.epochs", "greater than 0"),
        ({"stages": [{"kind": "distill", "losses": [{"kind": "kl"}]}]}, "stages.0.losses.0.kind", "forward_kl"),
        (
            {"stages": [{"kind": "distill", "losses": [{"kind": "forward_kl", "weight": "most"}]}]},
            "stages.0.losses.0.weight",
            "a number of at least 0, or 'auto'",
        ),
        (
            {"stages": [{"kind": "distill", "losses": [{"kind": "forward_kl", "weight": "auto"}]}]},
            "stages.0.losses",
            "at least one a number",
        ),
        ({"stages": [{"kind": "export"}]}, "stages.0", "needs a student"),
        ({"stages": []}, "stages", "at least 1"),
        ({"data": {"train": "tickets"}}, "data.train", "dataset/split"),
        ({"teacher": {"model": "../etc/passwd"}}, "teacher.model", "names no model"),
        ({"seed": "x"}, "seed", "integer"),
    ],
)
def test_error_names_field_and_remedy(change: dict, field: str, words: str) -> None:
    found = problems(SHORT | change)
    assert words in found[field]


def test_missing_test_split_is_said_before_anything_runs() -> None:
    found = problems(SHORT | {"data": {"train": "t/train"}})
    assert "data.test" in found["stages.3.kind"]


FIRST = {"kind": "intermediate", "task": {"label": "stars"}, "data": "reviews"}
IMPORTANT = {"kind": "teacher_layers", "keep": {"count": 1, "by": "importance"}}


def test_a_stage_with_data_of_its_own_sees_nothing_of_the_jobs() -> None:
    stages = [FIRST, *({"kind": kind} for kind in ("finetune", "distill", "evaluate"))]
    spec = load_spec(SHORT | {"stages": stages, "student": IMPORTANT})
    assert load_spec(spec.model_dump(mode="json")) == spec
    assert {start: seen.data.refs() for start, seen in spec.scopes().items()} == {
        "": {split: f"tickets/{split}" for split in ("train", "validation", "test")},
        "stages.0.": {split: f"reviews/{split}" for split in ("train", "validation")},
    }
    first, second, _, last = (spec.seen_by(stage) for stage in spec.stages)
    assert (first["task"]["label"], second["task"]["label"]) == ("stars", "label")
    assert "reviews" not in str(first) + str(second) + str(spec.stages[0].content())
    assert "stars" not in str(second)
    assert "reviews" in str(last)
    for seen, named in ((first, ["train", "validation"]), (second, ["train", "validation", "test"])):
        assert [*JobSpec.model_validate(seen).data.refs()] == named


@pytest.mark.parametrize(
    ("first", "change", "field", "words"),
    [
        ({}, {"task": {"kind": "causal_lm"}}, "kind", "leave the stage out"),
        ({"task": {"kind": "causal_lm"}}, {}, "task", "no trunk apart"),
        ({"task": {"kind": "sorting"}}, {}, "task.kind", "unknown kind"),
        ({"data": None}, {}, "data", "valid dictionary"),
        ({"data": "a/b"}, {}, "data.train", "names no split"),
        ({"data": {"train": "reviews"}}, {}, "data.train", "names no split"),
        ({"data": {"train": "reviews/train", "test": "reviews/test"}}, {}, "data.test", "unknown field"),
        ({"data": {"a": "reviews", "b": "reviews"}}, {}, "data.train", "has one task, so one split"),
        ({"of": "student"}, {"student": IMPORTANT}, "of", "train the student on that first"),
    ],
)
def test_an_intermediate_task_must_fit(first: dict, change: dict, field: str, words: str) -> None:
    found = problems(SHORT | change | {"stages": [FIRST | first, {"kind": "finetune"}, {"kind": "distill"}]})
    assert words in found[f"stages.0.{field}"]


@pytest.mark.parametrize(
    ("stages", "place", "words"),
    [
        ([{"kind": "finetune"}, FIRST, {"kind": "evaluate"}], 1, "add a 'finetune' stage"),
        ([{"kind": "quantize"}, FIRST | {"of": "student"}, {"kind": "distill"}], 1, "put 'intermediate' before it"),
    ],
)
def test_an_intermediate_task_has_its_place(stages: list, place: int, words: str) -> None:
    assert words in problems(SHORT | {"stages": stages})[f"stages.{place}.kind"]


@pytest.mark.parametrize("body", [b"\xff\xfe", b"[1, 2]", b"a: [", b"", b"{" * 100_000, b"&a [*a]"])
def test_unreadable_body_is_refused(body: bytes) -> None:
    with pytest.raises(SpecInvalid):
        parse_spec(body)


@pytest.mark.parametrize(("part", "is_valid"), [({"target": {}}, True), ({"target": {"min_retained": 2}}, False)])
def test_by_the_json_schema_a_target_stands_for_the_student(part: dict, is_valid: bool) -> None:
    validator = jsonschema.Draft202012Validator(JobSpec.model_json_schema())
    assert validator.is_valid({"teacher": {"kind": "model", "model": "bert"}, "data": "toy"} | part) == is_valid


def test_json_schema_holds_every_method() -> None:
    schema = str(JobSpec.model_json_schema())
    for kind in ("finetune", "distill", "export", "evaluate", "forward_kl", "onnx_int8", "teacher_layers"):
        assert f"'{kind}'" in schema


TEACHERS = [
    {"model": "a"},
    {"kind": "label_space", "model": "a", "prompt": "{text}:"},
    {"kind": "openai", "model": "a", "max_requests": 3},
    {"kind": "ensemble", "members": [{"model": "a"}, {"model": "t/b", "weight": 2.0}], "weighting": "entropy"},
]


@pytest.mark.parametrize("teacher", TEACHERS, ids=lambda teacher: teacher.get("kind", "model"))
def test_what_a_stage_sees_of_a_spec_can_be_read_as_one(teacher: dict) -> None:
    spec = load_spec(SHORT | {"teacher": teacher, "student": {"kind": "pretrained", "model": "b"}})
    for stage in spec.stages:
        seen = JobSpec.model_validate(spec.seen_by(stage))
        if stage.kind == "answer":
            assert type(seen.teacher) is type(spec.teacher)
            assert seen.teacher.sources().keys() == spec.teacher.sources().keys()


@pytest.mark.parametrize(
    ("stages", "advised"),
    [
        (["distill", "prune", "evaluate"], [1]),
        (["distill", "prune", "distill", "sparsify"], [3]),
        (["distill", "sparsify", "quantize", "export"], [1, 3]),
        (["prune", "sparsify", "quantize", "distill"], []),
        (["distill", "export", "prune", "distill"], [1]),
        (["distill", "export", "quantize", "evaluate"], [1]),
        (["distill", "export", "evaluate", "distill", "export"], [2]),
        (["distill", "export", "evaluate", "distill", "export", "evaluate"], []),
        (["distill", "evaluate", "export"], [1]),
    ],
)
def test_what_is_seldom_meant_is_told(stages: list[str], advised: list[int]) -> None:
    settings = {"prune": {"num_layers": 1}}
    whole = [{"kind": kind, **settings.get(kind, {})} for kind in stages]
    spec = load_spec(
        {"teacher": {"model": "m"}, "data": "d", "student": {"kind": "teacher_layers", "keep": [0, 1]}, "stages": whole}
    )
    assert [ordinal for ordinal, stage in enumerate(spec.stages) if stage.advise(spec)] == advised


@pytest.mark.parametrize(
    ("later", "advised"),
    [
        (["evaluate"], []),
        (["distill"], [1]),
        (["distill", "export", "evaluate"], [1]),  # of what it may publish onnx_int4 stays as it was
    ],
)
def test_a_student_that_changes_after_its_search_is_told_of(later: list[str], advised: list[int]) -> None:
    whole = [{"kind": kind} for kind in ("finetune", "search", *later)]
    spec = load_spec(SHORT | {"student": {"kind": "searched"}, "stages": whole})
    assert [ordinal for ordinal, stage in enumerate(spec.stages) if stage.advise(spec)] == advised
    whole[1]["formats"] = [{"kind": "onnx_int8"}]  # which an export writes unless it says otherwise
    spec = load_spec(SHORT | {"student": {"kind": "searched"}, "stages": whole})
    assert bool(spec.stages[1].advise(spec)) == (later == ["distill"])


def test_a_key_of_metadata_holds_no_colon() -> None:
    with pytest.raises(SpecInvalid) as caught:
        load_spec(SHORT | {"metadata": {"team:ml": "x"}})
    assert caught.value.details[0]["field"] == "metadata"
    assert "colon" in caught.value.details[0]["message"]
