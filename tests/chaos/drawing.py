"""Job specs drawn at random from the schema that the API publishes."""

import random
from typing import Any

from core.jobs.spec import JobSpec

SCHEMA = JobSpec.model_json_schema()
STAGES = SCHEMA["properties"]["stages"]["items"]["discriminator"]["mapping"]
SMALL = {  # of what takes long, the most that is drawn
    "epochs": 1,
    "max_trials": 1,
    "latency_samples": 10,
    "learning_rate": 0.01,
    "head_learning_rate": 0.01,
}
OWN = ("data", "task")  # which a stage may have besides the job's
INTEGERS = (1, 2, 3, 4, 8, 16, 32, 48, 64)
WIDEST = 2.0  # range of a number without a limit
MOST_OPTIONS = 3  # settings of an object that are drawn, on average
LATER = ("distill", "distill", "finetune", "prune", "quantize", "sparsify", "trim_vocabulary", "search", "augment")


def draw_value(rng: random.Random, schema: dict[str, Any], name: str = "") -> Any:
    """Returns something that a JSON schema allows; of an object the required settings and some others."""
    if "$ref" in schema:
        return draw_value(rng, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], name)
    if "const" in schema or "enum" in schema:
        return rng.choice(schema.get("enum", [schema.get("const")]))
    if "discriminator" in schema:
        return draw_value(rng, {"$ref": rng.choice([*schema["discriminator"]["mapping"].values()])}, name)
    if "anyOf" in schema:
        return draw_value(rng, rng.choice(schema["anyOf"]), name)
    match schema.get("type"):
        case "boolean":
            return rng.random() < 0.5
        case "integer" | "number" as kind:
            return _draw_number(rng, schema, name, is_whole=kind == "integer")
        case "string":
            return "a"
        case "array":
            count = rng.randint(max(1, schema.get("minItems", 1)), max(schema.get("minItems", 1), 2))
            return [draw_value(rng, schema["items"], name) for _ in range(count)]
        case "object":
            return _draw_object(rng, schema)
    return None


def _draw_number(rng: random.Random, schema: dict[str, Any], name: str, *, is_whole: bool) -> float:
    least = schema.get("minimum", schema.get("exclusiveMinimum", 0) + is_whole)
    most = schema.get("maximum", schema.get("exclusiveMaximum", least + 10**6))
    if name in SMALL:
        return min(SMALL[name], most)
    if is_whole:
        return max(least, min(most, rng.choice(INTEGERS)))
    if "minimum" in schema and rng.random() < 0.15:
        return least
    return round(least + min(most - least, WIDEST) * rng.uniform(0.05, 0.95), 4)


def _draw_object(rng: random.Random, schema: dict[str, Any]) -> dict[str, Any]:
    known, required = schema.get("properties", {}), schema.get("required", ())
    share = min(0.5, MOST_OPTIONS / max(1, len(known)))
    chosen = [name for name in known if name in required or name == "kind" or rng.random() < share]
    return {name: draw_value(rng, known[name], name) for name in chosen}


def draw_stages(rng: random.Random, *, writes: bool) -> list[dict[str, Any]]:
    """Returns stages, most of them in an order that can be: what trains a teacher first, what writes files last."""
    kinds = ["finetune"] * (rng.random() < 0.8) + ["generate"] * (writes and rng.random() < 0.15)
    kinds += ["answer"] * (rng.random() < 0.15) + [rng.choice(LATER) for _ in range(rng.randint(1, 4))]
    kinds += ["export"] * (rng.random() < 0.6) + ["evaluate"] * (rng.random() < 0.4)
    stages = []
    for place, kind in enumerate(kinds):
        stage = draw_value(rng, {"$ref": STAGES[kind]})
        stage = {name: value for name, value in stage.items() if name not in OWN}
        if kind in {"finetune", "distill"}:
            stage.setdefault("epochs", SMALL["epochs"])
        if kind == "finetune" and place and rng.random() < 0.7:
            stage["of"] = "student"
        stages.append(stage)
    return stages


def draw_student(rng: random.Random) -> dict[str, Any]:
    """Returns a student; one that starts from another model than the teacher starts from `small`."""
    usual = [{"kind": "teacher_layers", "keep": [0, 2]}, {"kind": "pretrained", "model": "small"}]
    student: dict[str, Any] = rng.choice([*usual, draw_value(rng, SCHEMA["properties"]["student"])])
    return student | ({"model": "small"} if student.get("model") else {})
