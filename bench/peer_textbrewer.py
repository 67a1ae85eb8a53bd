"""A peer of `encoder.py`: TextBrewer, which keeps the teacher's answers in memory after the first epoch."""

import math
from pathlib import Path
from typing import Any

import textbrewer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding


def distil(
    teacher: Any,
    student: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    optimizer: Any,
    schedule: LambdaLR,
    work: Path,
    course: Any,
    *,
    epochs: int,
    batch_size: int,
    temperature: float,
) -> None:
    """Trains the student on tokenised rows with a `labels` each, padded to the longest of a batch.

    TextBrewer's product for one teacher that keeps answers is the BasicDistiller; it computes in float32, as its half
    precision needs NVIDIA's Apex. Its divergence is T⁻² of ours and has the constant entropy of the teacher in it.
    """
    settings = textbrewer.TrainingConfig(output_dir=str(work / "textbrewer"), device="cpu")
    method = textbrewer.DistillationConfig(
        temperature=temperature,
        kd_loss_weight=temperature**2,
        hard_label_weight=1,
        is_caching_logits=True,
    )
    loader = DataLoader(rows, batch_size, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))
    distiller = textbrewer.BasicDistiller(
        settings,
        method,
        teacher,
        student,
        lambda _, found: {"logits": found.logits},
        lambda _, found: {"logits": found.logits, "losses": found.loss},
    )
    with distiller:
        course.begin()
        distiller.train(
            optimizer,
            loader,
            num_epochs=math.ceil(epochs),
            scheduler_class=lambda optimizer: schedule,  # noqa: ARG005 - made with the optimiser it is given back
            scheduler_args={},
            max_grad_norm=1.0,
        )
        course.note()
