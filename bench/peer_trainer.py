"""A peer of `encoder.py`: the Trainer of `transformers` with a loss of its own, as a competent user writes it."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

from worker.kernels.precision import has_fast_bf16


class DistillationTrainer(Trainer):
    """L = CE + T² · KL(teacher ‖ student), the teacher run on every batch."""

    def __init__(self, teacher: Any, temperature: float, **options: Any) -> None:
        super().__init__(**options)
        self.teacher, self.temperature = teacher.eval(), temperature

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        with torch.no_grad():
            soft = self.teacher(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        log_q = F.log_softmax(outputs.logits.float() / self.temperature, -1)
        p = F.softmax(soft.float() / self.temperature, -1)
        loss = outputs.loss + self.temperature**2 * F.kl_div(log_q, p, reduction="batchmean")
        return (loss, outputs) if return_outputs else loss


class Timer(TrainerCallback):
    """Notes the end of each step."""

    def __init__(self, course: Any) -> None:
        self.course = course

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.course.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.course.note()


def distil(
    teacher: Any,
    student: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    optimizer: Any,
    schedule: Any,
    work: Path,
    course: Any,
    *,
    epochs: float,
    batch_size: int,
    temperature: float,
) -> None:
    """Trains the student on tokenised rows with a `labels` each, padded to the longest of a batch."""
    settings = TrainingArguments(
        output_dir=str(work / "trainer"),
        per_device_train_batch_size=batch_size,
        num_train_epochs=epochs,
        max_grad_norm=1.0,
        bf16=has_fast_bf16("cpu"),
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    DistillationTrainer(
        teacher,
        temperature,
        model=student,
        args=settings,
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        optimizers=(optimizer, schedule),
        callbacks=[Timer(course)],
    ).train()
