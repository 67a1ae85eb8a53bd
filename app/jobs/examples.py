"""Specs as the API's documentation shows them."""

from typing import Any

SHORTEST: dict[str, Any] = {
    "teacher": {"model": "acme/minilm-l6"},
    "student": {"kind": "teacher_layers", "keep": [0, 2, 5]},
    "data": "tickets",
}
FULL: dict[str, Any] = {
    "name": "support-tickets",
    "task": {"kind": "text_classification", "text": "text", "label": "label"},
    "teacher": {"model": "hub:sentence-transformers/all-MiniLM-L6-v2@main"},
    "student": {"kind": "teacher_layers", "keep": [0, 2, 5]},
    "data": {"train": "tickets/train", "validation": "tickets/validation", "test": "tickets/test"},
    "stages": [
        {"kind": "finetune", "of": "teacher", "epochs": 4},
        {
            "kind": "distill",
            "epochs": 6,
            "losses": [{"kind": "cross_entropy"}, {"kind": "forward_kl", "temperature": 4.0, "weight": 1.0}],
        },
        {"kind": "export", "formats": [{"kind": "safetensors"}, {"kind": "onnx"}, {"kind": "onnx_int8"}]},
        {"kind": "evaluate"},
    ],
    "seed": 0,
    "metadata": {"team": "support"},
}
YAML = """\
teacher: {model: acme/minilm-l6}
student: {kind: teacher_layers, keep: [0, 2, 5]}
data: tickets
"""
LONGER_FORK: dict[str, Any] = {
    "from_stage": "distill",
    "overrides": {"stages": [{"kind": "distill", "epochs": 12}, {"kind": "export"}]},
}
TRYING_FORK: dict[str, Any] = {
    "from_stage": 4,
    "overrides": {"stages": [{"kind": "predict", "texts": ["my parcel is late", "I can't log in"]}]},
}
FRESH_FORK: dict[str, Any] = {"from_stage": 2, "overrides": {"name": "again", "cache": "refresh"}}
FORK_YAML = """\
from_stage: distill
overrides: {seed: 7}
"""


def _body(schema: str, description: str, examples: dict[str, Any], yaml: str) -> dict[str, Any]:
    ref = {"$ref": f"#/components/schemas/{schema}"}
    content = {
        "application/json": {"schema": ref, "examples": examples},
        "application/yaml": {"schema": ref, "example": yaml},
    }
    return {"requestBody": {"required": True, "description": description, "content": content}}


SPEC_BODY = _body(
    "JobSpec",
    "The job spec, in JSON or YAML; the content tells which.",
    {
        "shortest": {"summary": "The shortest useful spec", "value": SHORTEST},
        "full": {"summary": "Every part written out", "value": FULL},
    },
    YAML,
)
FORK_BODY = _body(
    "Fork",
    "Where the fork begins and what it changes, in JSON or YAML; the content tells which.",
    {
        "longer": {"summary": "Train the student for longer and export it", "value": LONGER_FORK},
        "trying": {"summary": "Ask teacher and student, once four stages are done", "value": TRYING_FORK},
        "fresh": {"summary": "Run the last stages again, without the cache", "value": FRESH_FORK},
        "data": {
            "summary": "The same job on other data",
            "value": {"from_stage": 0, "overrides": {"data": "tickets-2"}},
        },
    },
    FORK_YAML,
)
