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
REF = {"$ref": "#/components/schemas/JobSpec"}
SPEC_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "The job spec, in JSON or YAML; the content tells which.",
        "content": {
            "application/json": {
                "schema": REF,
                "examples": {
                    "shortest": {"summary": "The shortest useful spec", "value": SHORTEST},
                    "full": {"summary": "Every part written out", "value": FULL},
                },
            },
            "application/yaml": {"schema": REF, "example": YAML},
        },
    }
}
