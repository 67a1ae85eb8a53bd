"""Instructions: a real tiny Llama learns to answer questions of grade-school mathematics, and teaches a smaller one."""

import json
import shutil
from itertools import islice
from pathlib import Path

import pytest

from tests.engine_bench import Bench, make_spec

SHARED = Path(__file__).parents[3] / "shared"
STORIES, GSM8K = SHARED / "models" / "stories260k", SHARED / "data" / "gsm8k"
TEMPLATE = (
    "{% for m in messages %}{{ 'Question: ' if m.role == 'user' else 'Answer:\\n' }}{{ m.content }}"
    "{{ '\\n' if m.role == 'user' else eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer:\\n' }}{% endif %}"
)


@pytest.mark.skipif(not (STORIES.is_dir() and GSM8K.is_dir()), reason=f"no model and data at {SHARED}")
def test_a_llama_learns_to_answer_questions_and_teaches_a_smaller_one(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    shutil.copytree(STORIES, bench.inputs / "teacher")
    for path in (bench.inputs / "teacher").iterdir():
        path.chmod(0o644)
    settings = bench.inputs / "teacher" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": TEMPLATE}))
    (bench.inputs / "data").mkdir()
    for split, count in (("train", 60), ("validation", 10), ("test", 10)):
        with (GSM8K / f"{split}.jsonl").open() as lines:
            (bench.inputs / "data" / f"{split}.jsonl").write_text("".join(islice(lines, count)))
    task = {"kind": "causal_lm", "prompt": "prompt", "text": "response", "chat": True, "block_tokens": 256}
    fast = {"epochs": 2, "learning_rate": 2e-3, "batch_size": 4}
    stages = [
        {"kind": "finetune", **fast},
        {"kind": "distill", **fast, "losses": [{"kind": "cross_entropy"}, {"kind": "reverse_kl", "temperature": 1.0}]},
        {"kind": "evaluate", "latency_samples": 10},
    ]
    spec = make_spec(stages, task=task, student={"kind": "teacher_layers", "keep": [0, 2, 4]})
    for ordinal, stage in enumerate(spec["stages"]):
        finished = bench.run(spec, ordinal, labels=[])
        assert finished.last["type"] == "result", finished.log
        bench.adopt(finished, ordinal, stage["kind"])
        if stage["kind"] == "finetune":
            losses = [loss for _, loss in finished.series("validation/loss")]
            assert losses[-1] < losses[0]
    rows = {row["name"]: row for row in finished.last["summary"]["models"]}
    assert rows["student"]["num_parameters"] < rows["teacher"]["num_parameters"]
    assert rows["student"]["perplexity"] < 1.6 * rows["teacher"]["perplexity"]
