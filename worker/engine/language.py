"""Causal language modelling inside a stage."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from core.errors import StageFailed
from core.models.vocabulary import VocabularyDiffers, count_common
from worker.engine import ranks
from worker.engine.aligning import AnswersAcross, Stream
from worker.engine.answering import Asked, keep_likeliest
from worker.engine.blocks import NOWHERE, Blocks, count_bytes_of_texts, read_prompts, read_starts, read_stream
from worker.engine.data import Batch, check_tokens
from worker.engine.evaluation import Card, Column, Measured, Quality, Row, open_candidates, row_of_answers
from worker.engine.inference import Answer
from worker.engine.keeping import KeptLayers, Recorder
from worker.engine.loading import count_positions, load_language_model, save_language_model
from worker.engine.measuring import CPU, as_forward, count_bytes, measure_speed, time_singles
from worker.engine.members import Members, count_tokens, load_members
from worker.engine.next_tokens import predict_next
from worker.engine.predicting import Said, go_on_each
from worker.engine.rendering import if_known, percent
from worker.engine.scores import bootstrap_sums, largest_difference, same_first
from worker.engine.sharding import is_sharded
from worker.engine.tasks import Kept, Scores, TaskHead
from worker.engine.teaching import AnswersKept, AnswersOnline, Teaching
from worker.kernels.divergences import forward_kl
from worker.kernels.heads import Head, rows_at_once
from worker.kernels.mixtures import Mixture

if TYPE_CHECKING:
    from worker.engine.context import StageContext
    from worker.methods.stages.answer import Answer as AnswerStage
    from worker.methods.stages.distill import Distill, OnPolicy
    from worker.methods.stages.evaluate import Evaluate
    from worker.methods.stages.generate import Generate
    from worker.methods.stages.predict import Predict
    from worker.methods.tasks.causal_lm import CausalLM

SAMPLED_TOKENS = 1024  # all of whose logits are in memory at once
CALIBRATION_TOKENS = 32_768  # ten times as many as a matrix of a small model has inputs
MAX_LOSS = 700.0  # whose exponential is still a number
SAME_TOKENS = "Choose a student with the teacher's tokenizer; other tokens cannot be compared one by one."
log = logging.getLogger(__name__)


class LanguageModelling:
    """A causal language model."""

    headline, share = "loss", "probability"
    heads: ClassVar[Mapping[str, TaskHead]] = {}

    def __init__(self, ctx: "StageContext", task: "CausalLM") -> None:
        self.ctx, self.task = ctx, task
        self.num_common: int | None = None  # tokens that teacher and student share, where one has logits for more
        self._num_positions: int | None = None  # of a teacher that reads the student's blocks

    def load_model(self, folder: Path, **options: Any) -> PreTrainedModel:
        """Returns the folder's language model."""
        return load_language_model(folder, **options)

    def start(self, model: PreTrainedModel) -> None:
        """Leaves a model as it is: its last layer has no better start than chance."""

    def save_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """Writes the model and its tokenizer."""
        save_language_model(model, tokenizer, folder)

    def encode(
        self,
        path: Path,
        model: PreTrainedModel | Members,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,  # noqa: ARG002
    ) -> Blocks:
        """Returns the split in blocks of the task's length; no text is cut."""
        lengths = (self.task.block_tokens, count_positions(model), self._num_positions)
        ids, learned = read_stream(path, self.task.columns(), tokenizer, is_chat=self.task.chat)
        split = Blocks(ids, learned, min(filter(None, lengths)))
        counts_V = split.count_ids()
        if self.num_common is not None:
            check_tokens(counts_V, self.num_common, tokenizer, path.stem, "teacher or the student", SAME_TOKENS)
        elif not isinstance(model, Members):  # which have checked it, each alone
            check_tokens(counts_V, model.config.vocab_size, tokenizer, path.stem, "model")
        if not split.learned_S[1:].any():
            raise StageFailed("dataset_invalid", f"{path.name} has no token to predict.")
        return split

    def is_head(self, model: PreTrainedModel, name: str) -> bool:  # noqa: ARG002 - trained as long as all else
        """Returns no: the last layer is no newer than the others."""
        return False

    def answer(self, model: PreTrainedModel, batch: Batch) -> Head | Tensor:
        """Returns what makes the logits of the tokens that are to be predicted."""
        return predict_next(model, batch.inputs, batch.is_row, self.num_common)

    def _hear(self, model: PreTrainedModel | Members, batch: Batch) -> Head | Mixture | Tensor:
        """Returns what makes the logits of one model, or of several together."""
        return model.answer(batch, self.answer) if isinstance(model, Members) else self.answer(model, batch)

    def score(self, model: PreTrainedModel | Members, data: Blocks, between: Callable[[], None]) -> Scores:
        """Returns the cross entropy of a token in nats, its exponential, and the share of tokens put first.

        `probability` is what tokens are given, the geometric mean: 1 over the perplexity.
        """
        was_training, sums_J = model.training, np.zeros(len(SUMS))
        model.eval()
        for batch in ranks.share(data.in_order(model.device), in_step=is_sharded(model)):
            sums_J += self._compare([model], batch)[0]
            between()
        model.train(was_training)
        found = summarise(ranks.add_up(torch.from_numpy(sums_J).to(model.device)).cpu().numpy())
        scores: Scores = {name: found[name] for name in ("loss", "perplexity", "accuracy")}
        return scores | {"probability": 1 / scores["perplexity"]}

    def _compare(self, models: Sequence[PreTrainedModel | Members], batch: Batch) -> NDArray[np.float64]:
        """Returns SUMS over the batch's rows for each model, the first of which is the teacher."""
        sums_MJ = np.zeros((len(models), len(SUMS)))
        labels_N = batch.row_labels
        with torch.no_grad():
            answers = [self._hear(model, batch) for model in models]
            chunk = rows_at_once(labels_N, models[0].config.vocab_size)
            for start in range(0, len(labels_N), chunk):
                rows = slice(start, start + chunk)
                log_p_NC = _log_softmax(answers[0], rows)
                for index, answer in enumerate(answers):
                    log_q_NC = log_p_NC if index == 0 else _log_softmax(answer, rows)
                    first_N = log_q_NC.argmax(-1)
                    sums_MJ[index] += (
                        len(first_N),
                        F.nll_loss(log_q_NC, labels_N[rows], reduction="sum").item(),
                        (first_N == labels_N[rows]).sum().item(),
                        forward_kl(log_p_NC, log_q_NC).sum().item() if index else 0.0,
                        (first_N == log_p_NC.argmax(-1)).sum().item(),
                    )
        return sums_MJ

    def sample(self, path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Blocks:
        """Returns the first blocks of the split that have something to predict."""
        return self.encode(path, model, tokenizer, 0).head(SAMPLED_TOKENS)

    def calibrate(self, path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Blocks:
        """Returns blocks from all over the split, as short as those of a sample."""
        return self.encode(path, model, tokenizer, 0).spread(CALIBRATION_TOKENS, SAMPLED_TOKENS)

    def logits(self, answer: Answer, data: Blocks, between: Callable[[], None]) -> Tensor:
        """Returns the logits of every token that is to be predicted, logits_NV."""
        found = []
        for batch in data.in_order(CPU):
            found.append(answer(batch.inputs)[batch.is_row].float().cpu())
            between()
        return torch.cat(found)

    def compare(self, found: Tensor, expected: Tensor) -> tuple[float, float]:
        """Returns the largest difference of a logit, and how far the answers agree."""
        return largest_difference(found, expected), self.agreement(found, expected)

    def agreement(self, logits_NC: Tensor, others_NC: Tensor) -> float:
        """Returns the share of tokens for which both put the same one first."""
        return same_first(logits_NC, others_NC)

    def rank(self, scores: Scores) -> tuple[float, ...]:
        """Returns what rises as the loss falls."""
        return (-scores["loss"],)

    def teach(self, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: "Distill") -> Teaching:
        """Returns the answers that an earlier stage kept, or else the teacher, answering batch by batch."""
        if self.ctx.has_input("answers") and not settings.on_policy:
            folder = self.ctx.input("answers")
            kept = AnswersKept(folder, KeptLayers(folder, self.ctx.device) if settings.feature_losses else None)
            if kept.num_classes > student.config.vocab_size:
                message = f"The kept answers are over {kept.num_classes} tokens, and the student has fewer."
                hint = "Choose a student with all of these; with one model as the teacher, 'answer' can be left out."
                raise StageFailed("vocab_incompatible", message, suggestion=hint)
            self._agree(tokenizer)  # the answers may be over tokens, too, that the student's tokenizer lacks
            self.num_common = kept.num_classes if kept.num_classes < student.config.vocab_size else None
            return kept
        teacher = self.ctx.load_teacher()
        if not settings.compares_tokens(self.ctx.spec) and not self._reads_alike(tokenizer):
            return self._teach_across(teacher, tokenizer, settings)
        self._agree(tokenizer, teacher.config.vocab_size, student.config.vocab_size)
        self._num_positions = count_positions(teacher)
        return AnswersOnline(self.ctx, teacher)

    def prompts(
        self, path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: "OnPolicy | Generate"
    ) -> list[NDArray[np.int32]]:
        """Returns what a model goes on after of each row, in tokens.

        Raises:
            StageFailed: `spec_invalid` if the model has too few positions.
        """
        longest = count_positions(model)
        wanted = settings.prompt_tokens + settings.new_tokens
        if longest is not None and wanted > longest:
            message = f"prompt_tokens and new_tokens are {wanted} together; the model has places for {longest}."
            raise StageFailed("spec_invalid", message, suggestion="Lower one of them.")
        return read_prompts(path, self.task.columns(), tokenizer, settings.prompt_tokens, is_chat=self.task.chat)

    def _reads_alike(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Returns whether a student's tokens are the teacher's."""
        try:
            count_common(self.ctx.load_tokenizer("teacher").get_vocab(), tokenizer.get_vocab())
        except VocabularyDiffers:
            return False
        return True

    def _teach_across(
        self, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: "Distill"
    ) -> Teaching:
        """Returns the teacher on its own tokens. Raises StageFailed for what that rules out."""
        wrong = "on_policy" if settings.on_policy else "task.chat" if self.task.chat else None
        if wrong:
            message = f"Teacher and student have other tokens, and {wrong} needs the same ones."
            raise StageFailed("vocab_incompatible", message, suggestion=f"Leave {wrong} out.")
        path, columns, own = self.ctx.get_split("train"), self.task.columns(), self.ctx.load_tokenizer("teacher")
        own_stream, stream = (
            Stream(read_stream(path, columns, reader)[0], read_starts(path, columns, reader))
            for reader in (own, tokenizer)
        )
        teaching = AnswersAcross(teacher, own_stream, stream, predict_next)
        log.info("the teacher is heard at %.1f %% of the student's tokens", 100 * (teaching.asked_P != NOWHERE).mean())
        return teaching

    def _agree(self, tokenizer: PreTrainedTokenizerBase, *widths: int) -> None:
        """Sees to it that teacher and student choose among the same tokens. Raises StageFailed if they cannot.

        Where one has logits for more, as to make the width a round number, the others are left out before the softmax.
        """
        role = "teacher" if self.ctx.has_input("teacher") else "teacher_1"  # of several, which have the same tokens
        try:
            common = count_common(self.ctx.load_tokenizer(role).get_vocab(), tokenizer.get_vocab())
        except VocabularyDiffers as error:
            raise StageFailed("vocab_incompatible", f"{error}.", suggestion=SAME_TOKENS) from error
        fewest = min([common, *widths])
        if any(width > fewest for width in widths):
            self.num_common = fewest

    def keep(self, settings: "AnswerStage") -> Kept:
        """Has the teacher answer every place of the training split, and keeps its likeliest tokens.

        Of the test split, if it is to be answered, SUMS of each block are kept, as `test`.
        """
        ctx, (model, tokenizer) = self.ctx, load_members(self.ctx)
        paths: dict[str, Path | None] = {split: ctx.find_split(split) for split in settings.splits}
        read = {split: self.encode(path, model, tokenizer, 0) for split, path in paths.items() if path}
        if isinstance(model, Members):
            model.check(read, tokenizer)
        self.num_common, train, wanted = count_tokens(model, tokenizer), read["train"], settings.layers.wanted
        recorder = Recorder(ctx, model, train, wanted) if wanted else None
        asked = Asked(model, partial(self._hear, model), train, self.num_common, recorder)
        width, kept_probability = keep_likeliest(ctx, asked, settings)
        tensors = {"num_classes": torch.tensor(self.num_common)}
        scores = self.score(model, read["validation"], ctx.check_stop) if "validation" in read else None
        if "test" in read:
            sums_BJ = self._sum_up({"teacher": model}, {"teacher": read["test"]}, [["teacher"]])["teacher"]
            tensors["test"] = torch.from_numpy(sums_BJ)
        num_rows = int(train.is_learned[1:].sum())
        summary = {"num_rows": num_rows, "top_k": width, "kept_probability": kept_probability}
        return Kept(tensors, train.digest(), scores, summary, train.num_places)

    def measure(self, settings: "Evaluate") -> Measured:
        """Measures loss, perplexity and accuracy of the next token, the distance from the teacher, and speed.

        A student with other tokens reads the split as its own; its distance from the teacher is not known then, nor
        from one that is no model, of which what it answered to the test split is measured, if it was asked.
        """
        ctx = self.ctx
        path, tokenizer = ctx.get_split("test"), ctx.load_tokenizer("student")
        models = open_candidates(ctx)
        names = list(models)
        has_teacher = ctx.spec.teacher.is_model
        is_alike = not has_teacher or self._reads_alike(tokenizer)
        if has_teacher and is_alike:
            self._agree(tokenizer, *{model.config.vocab_size for model in models.values()})
        groups = [names] if is_alike else [names[:1], names[1:]]  # of models that read alike
        tests = {
            name: test
            for group in groups
            for shortest in [min(group, key=lambda name: count_positions(models[name]) or math.inf)]
            for test in [self.encode(path, models[shortest], ctx.load_tokenizer(shortest), 0)]
            for name in group
        }
        total = sum(len(tests[group[0]]) for group in groups) + 1
        sums_BJ = self._sum_up(models, tests, groups)
        ctx.progress(total - 1, total)
        timed = [(as_forward(models[name]), tests[name]) for name in names]
        speeds = [measure_speed(*one, ctx.check_stop) for one in timed]
        latencies = time_singles(timed, settings.latency_samples, ctx.check_stop)
        ctx.progress(total, total)
        num_bytes = count_bytes_of_texts(path, self.task.columns())
        rows = [
            {"name": name, "runtime": getattr(models[name], "runtime", "torch")}
            | self._rate(sums_BJ[name], num_bytes, settings)
            | ({} if has_teacher and name in groups[0] else {"kl_to_teacher": None, "agreement": None})
            | {"size_bytes": count_bytes(ctx.input(name)), "num_parameters": num_parameters}
            | {"throughput_per_s": speed}
            | latency
            for name, speed, latency in zip(names, speeds, latencies, strict=True)
            for num_parameters in [models["teacher" if name == "teacher" else "student"].num_parameters()]
        ]
        heard = None if has_teacher or not ctx.has_input("answers") else AnswersKept(ctx.input("answers")).of_test()
        if heard is not None:
            rows.insert(0, row_of_answers(self._rate(heard.numpy(), num_bytes, settings)))
        return Measured(
            num_examples=len(tests["student"]),
            models=rows,
            columns=COLUMNS,
            quality=Quality("perplexity", "perplexity", 1.0),
            card=Card("language_model_card.md.j2", "text-generation", _card_metrics),
            notes=NOTES,
            details={},
        )

    def predict(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: "Predict") -> Said:
        """Returns how a model goes on after some texts."""
        return go_on_each(self.ctx, model, tokenizer, settings, chat=self.task.chat)

    def _rate(self, sums_BJ: NDArray[np.float64], num_bytes: int, settings: "Evaluate") -> Row:
        """Returns how good a model with these SUMS is."""
        interval = bootstrap_sums(sums_BJ, _perplexity, settings.confidence, self.ctx.spec.seed)
        bits = float(sums_BJ.sum(axis=0)[1] / math.log(2))
        return summarise(sums_BJ.sum(axis=0)) | {"bits_per_byte": bits / num_bytes, "perplexity_ci": interval}

    def _sum_up(
        self, models: Mapping[str, PreTrainedModel | Members], tests: dict[str, Blocks], groups: list[list[str]]
    ) -> dict[str, NDArray[np.float64]]:
        """Returns SUMS of each block of its split by model, sums_BJ; each group is compared with its first model."""
        done, total = 0, sum(len(tests[group[0]]) for group in groups) + 1
        found: dict[str, NDArray[np.float64]] = {}
        for group in groups:
            blocks = []
            for batch in tests[group[0]].in_order(models[group[0]].device):
                self.ctx.progress(done, total)
                blocks.append(self._compare([models[name] for name in group], batch))
                done += 1
            found |= dict(zip(group, np.stack(blocks, axis=1), strict=True))
        return found


SUMS = ("rows", "loss", "accuracy", "kl_to_teacher", "agreement")
COLUMNS = [
    Column("perplexity", lambda row: f"{row['perplexity']:.3f}"),
    Column("interval", lambda row: "{:.3f} to {:.3f}".format(*row["perplexity_ci"])),
    Column("loss, nats a token", lambda row: f"{row['loss']:.4f}"),
    Column("accuracy, %", lambda row: percent(row["accuracy"])),
    Column("bits per byte", lambda row: f"{row['bits_per_byte']:.4f}"),
    Column("KL to the teacher, nats", if_known("kl_to_teacher", "{:.4f}".format)),
    Column("agreement, %", if_known("agreement", percent)),
    Column("tokens/s", if_known("throughput_per_s", "{:.0f}".format)),
]
NOTES = (
    "Perplexity, loss, accuracy and KL are of the next token, over all tokens of the test split but those of prompts.",
    "Intervals: percentile bootstrap over the blocks of the test split, 1,000 resamples, without the randomness of "
    "training.",
    "Bits per byte: the loss of all tokens over the bytes of the texts, which models with other tokens have in common.",
    "Latency: one block read at once, the models in turn. Throughput: batches of 8 blocks. A warm-up comes first.",
    "Agreement: share of tokens for which the model puts the same one first as the teacher.",
)


def summarise(sums_J: NDArray[np.float64]) -> Row:
    """Returns the means over rows of SUMS, and the perplexity."""
    means = {name: float(value) for name, value in zip(SUMS[1:], sums_J[1:] / max(1.0, sums_J[0]), strict=True)}
    return means | {"perplexity": math.exp(min(means["loss"], MAX_LOSS))}


def _perplexity(sums_J: NDArray[np.float64]) -> float:
    return float(summarise(sums_J)["perplexity"])


def _log_softmax(answer: Head | Mixture | Tensor, rows: slice) -> Tensor:
    logits_NC = answer[rows].float() if isinstance(answer, Tensor) else answer.logits(rows)
    return F.log_softmax(logits_NC, dim=-1)


def _card_metrics(student: Row) -> list[dict[str, Any]]:
    return [{"type": "perplexity", "value": round(student["perplexity"], 4), "name": "Perplexity"}]
