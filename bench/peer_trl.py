"""The peer of `causal_lm.py`: TRL's GKDTrainer with the forward KL, on texts or on what the student writes."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peer_trainer import Timer
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import SequentialSampler
from trl.experimental.gkd import GKDConfig, GKDTrainer

from worker.engine.devices import choose_device
from worker.engine.loading import load_tokenizer
from worker.kernels.precision import has_fast_bf16


class Sequential(GKDTrainer):
    """Takes the examples as they come."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """One more token than is read, so that as many are supervised as elsewhere; the first is the prompt."""
    texts = [torch.tensor(row["input_ids"]) for row in rows]
    ids = pad_sequence(texts, batch_first=True)
    mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
        "prompts": ids[:, :1],
        "prompt_attention_mask": mask[:, :1],
    }


def collate_prompts(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The examples as prompts; what follows them is written in each step."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    mask = torch.ones_like(ids)
    whole = {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
    return whole | {"prompts": ids, "prompt_attention_mask": mask}


def distil(
    teacher: Any,
    student: Any,
    examples: list[list[int]],
    work: Path,
    course: Any,
    *,
    batch_size: int,
    rate: float,
    new_tokens: int = 0,
) -> None:
    """Trains the student on the examples, in order; with `new_tokens`, on so many that it writes after each."""
    settings = GKDConfig(
        output_dir=str(work / "trl"),
        per_device_train_batch_size=batch_size,
        num_train_epochs=1,
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_steps=round(0.1 * len(examples) / batch_size),
        weight_decay=0.01,
        max_grad_norm=1.0,
        lmbda=1.0 if new_tokens else 0.0,
        max_new_tokens=max(1, new_tokens),
        beta=0.0,
        temperature=1.0,
        max_length=None,
        bf16=has_fast_bf16(choose_device().type),
        use_cpu=choose_device().type == "cpu",
        gradient_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Sequential(
        model=student,
        teacher_model=teacher,
        args=settings,
        data_collator=collate_prompts if new_tokens else collate,
        train_dataset=Dataset.from_dict({"input_ids": examples}),
        processing_class=load_tokenizer(work / "in" / "teacher"),
        callbacks=[Timer(course)],
    )
    trainer.train()
