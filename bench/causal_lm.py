"""Distillation of a language model, beside TRL and plain loops in the same run: time, memory, and what was learned.

    pip install --constraint constraints.txt '.[bench]'
    python bench/causal_lm.py [--data DIR] [--steps N] [--rounds N] [--only NAME] [--out DIR]

GPT-2 of 4 layers of width 256 into 2 of its layers, a vocabulary of 50,257, steps of 4 × 256 tokens of WikiText-2
(CC BY-SA, Merity et al. 2016), forward KL at T = 1 and nothing else, the same blocks in the same order for all. With a
GPU, a Llama of 16 layers of width 2,048 into 8 of its layers, a vocabulary of 128,256, and steps of 8 × 1,024 tokens.
The teacher is trained first by a plain loop. Each contender runs in a process of its own, in bf16 where the device has
it: `trl` is `GKDTrainer` (which knows no temperature) with lmbda=0 and beta=0; `plain` is a hand-written loop; `floor`
is such a loop that trains the student on the texts alone; `online` and `cached` are ours, with the teacher beside the
student and with the answers that the stage `answer` kept. In `trl own` and `own` the student writes 64 tokens after a
prompt of 64 in each step, and hears the teacher on them. Rounds go through the contenders in turn. Time is the median
of the steps after the first five, of own texts the mean of all, as they are written for several steps at once; memory
is what is resident, or allocated on the GPU, at the worst moment beyond what was before the first step; the KL is that
of the validation split after the last step. With a GPU it tells the share of its speed at large bfloat16 products that
the products of the models reach, which is 2 operations for each weight and token forwards and twice that backwards.
Prints a table and writes `causal_lm.json`.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from duel import Course, answer_alone, console, finish, lay, measure_alone, run_stage
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
from worker.engine.devices import autocast, choose_device

HERE = Path(__file__).parent
DEFAULT_DATA = HERE.parents[1] / "shared" / "data" / "wikitext2_mini"
DEVICE = choose_device()
ON_GPU = DEVICE.type == "cuda"
NUM_WORDS, SEED, WARM_UP = 50_257, 0, 5
BATCH, TOKENS, VOCABULARY = (8, 1024, 128_256) if ON_GPU else (4, 256, NUM_WORDS)
NUM_LAYERS, RATE, TEACHER_STEPS = (16, 3e-4, 16) if ON_GPU else (4, 1e-3, 150)
KEEP = list(range(0, NUM_LAYERS, 2)) if ON_GPU else [0, 3]
CONTENDERS = ("trl", "online", "floor", "cached", "plain", "trl own", "own")
OWN_STEPS, PROMPT, WRITTEN = 16, 64, 64
GOALS = {
    "online, times faster than trl": (1.3, "at least"),
    "online, added memory over trl's": (0.4, "at most"),
    "cached, times faster than trl": (1.8, "at least"),
    "cached, time over the floor's": (1.10, "at most"),
    "online, KL over trl's": (1.01, "at most"),
    "own, times faster than trl own": (1.2, "at least"),
}


def prepare(data: Path, work: Path) -> None:
    """Writes a tokenizer, the splits, a trained teacher, and the student in its first state."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=NUM_WORDS, special_tokens=["<|endoftext|>"], show_progress=False)
    texts = [json.loads(line)["text"] for line in (data / "train.jsonl").open(encoding="utf-8")]
    raw.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>")
    (work / "in" / "data").mkdir(parents=True)
    (work / "in" / "data" / "validation.jsonl").symlink_to((data / "validation.jsonl").resolve())
    write_some(texts, work / "in" / "data" / "train.jsonl", TEACHER_STEPS * BATCH * TOKENS)
    teacher = make_teacher()
    tokenizer.save_pretrained(work / "in" / "teacher")
    teacher.save_pretrained(work / "in" / "teacher")
    blocks = read_blocks(work, "train")
    write_prompts(blocks, tokenizer, work / "in" / "data" / "prompts.jsonl")
    train(teacher, [blocks.batch(rows, DEVICE) for rows in order(len(blocks), TEACHER_STEPS)], Course(), cross_entropy)
    teacher.save_pretrained(work / "in" / "teacher")


def make_teacher() -> Any:
    """Returns the teacher with random weights, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    shared: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    if ON_GPU:  # the shape of Llama 3.2 1B
        config = LlamaConfig(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=TOKENS + 1,
            tie_word_embeddings=True,
            **shared,
        )
        with DEVICE:
            return LlamaForCausalLM(config)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=256, n_layer=NUM_LAYERS, n_head=4, n_positions=TOKENS + 1, **rates, **shared)
    )


def write_some(texts: list[str], path: Path, num_tokens: int) -> None:
    """Writes the first texts, of about so many tokens or more: no more than the steps read."""
    left = 5 * num_tokens  # characters
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            if left > 0:
                file.write(json.dumps({"text": text}) + "\n")
                left -= len(text)


def write_prompts(blocks: Any, tokenizer: Any, path: Path) -> None:
    """Writes prompts of the same number of tokens, none of which is an end, as many as steps on own texts need."""
    with path.open("w", encoding="utf-8") as file:
        num_written = 0
        for start in range(0, len(blocks.ids_S) - PROMPT, PROMPT):
            text = tokenizer.decode(blocks.ids_S[start : start + PROMPT])
            ids = tokenizer(text)["input_ids"]
            if num_written < OWN_STEPS * BATCH and len(ids) == PROMPT and tokenizer.eos_token_id not in ids:
                file.write(json.dumps({"prompt": text, "text": "."}) + "\n")
                num_written += 1


def read_blocks(work: Path, split: str, columns: dict[str, str] | None = None) -> Any:
    from worker.engine.blocks import Blocks, read_stream
    from worker.engine.loading import load_tokenizer

    tokenizer = load_tokenizer(work / "in" / "teacher")
    return Blocks(
        *read_stream(work / "in" / "data" / f"{split}.jsonl", {"text": "text", **(columns or {})}, tokenizer), TOKENS
    )


def order(num_blocks: int, num_steps: int) -> Iterator[np.ndarray]:
    """Yields the blocks of each step as the engine draws them: a permutation an epoch, by seed and epoch."""
    epoch, made = 0, 0
    while made < num_steps:
        permutation = np.random.default_rng([SEED * 1009, epoch]).permutation(num_blocks)
        for start in range(0, num_blocks, BATCH):
            if made < num_steps:
                yield permutation[start : start + BATCH]
                made += 1
        epoch += 1


def load_pair(work: Path) -> tuple[Any, Any]:
    """Returns teacher and student."""
    from worker.engine.loading import load_language_model
    from worker.engine.students import keep_layers

    teacher = load_language_model(work / "in" / "teacher").eval().to(DEVICE)
    return teacher, keep_layers(teacher, KEEP).to(DEVICE)


Loss = Callable[[Any, Any], torch.Tensor]


def cross_entropy(model: Any, batch: Any) -> torch.Tensor:
    logits = model(**batch.inputs, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten())


def divergence(teacher: Any) -> Loss:
    def loss(model: Any, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            soft = F.log_softmax(teacher(**batch.inputs, use_cache=False).logits.float(), -1)
        found = F.log_softmax(model(**batch.inputs, use_cache=False).logits.float(), -1)
        return F.kl_div(found.flatten(0, 1), soft.flatten(0, 1), reduction="batchmean", log_target=True)

    return loss


def train(model: Any, batches: list[Any], course: Course, loss: Loss) -> None:
    """An ordinary loop: AdamW, linear warm-up and decay, clipping, bf16 autocast where the device has it."""
    from transformers import get_linear_schedule_with_warmup

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.1 * len(batches)), len(batches))
    course.begin()
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        with autocast(DEVICE):
            value = loss(model, batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        value.item()
        course.note()


def run_loop(work: Path, steps: int, *, floor: bool) -> tuple[Any, Course]:
    teacher, student = load_pair(work)
    blocks, course = read_blocks(work, "train"), Course()
    batches = [blocks.batch(rows, DEVICE) for rows in order(len(blocks), steps)]
    train(student, batches, course, cross_entropy if floor else divergence(teacher))
    return student, course


def run_trl(work: Path, steps: int) -> tuple[Any, Course]:
    from peer_trl import distil

    teacher, student = load_pair(work)
    blocks, course = read_blocks(work, "train"), Course()
    rows = [row for step in order(len(blocks), steps) for row in step]
    starts = np.array(rows) * TOKENS
    examples = [blocks.ids_S[start : start + TOKENS + 1].tolist() for start in starts]
    distil(teacher, student, examples, work, course, batch_size=BATCH, rate=RATE)
    return student, course


def run_trl_own(work: Path) -> tuple[Any, Course]:
    from peer_trl import distil

    from worker.engine.blocks import read_prompts
    from worker.engine.loading import load_tokenizer

    teacher, student = load_pair(work)
    columns = {"text": "text", "prompt": "prompt"}
    prompts = read_prompts(
        work / "in" / "data" / "prompts.jsonl", columns, load_tokenizer(work / "in" / "teacher"), PROMPT
    )
    course, ids = Course(), [prompt.tolist() for prompt in prompts[: OWN_STEPS * BATCH]]
    distil(teacher, student, ids, work, course, batch_size=BATCH, rate=RATE, new_tokens=WRITTEN)
    return student, course


def run_ours(work: Path, steps: int, *, cached: bool = False, own: bool = False) -> tuple[Any, Course]:
    """Runs the stage as its process does, without the supervisor."""
    from core.jobs.spec import load_spec
    from worker.engine.loading import load_language_model

    split = "prompts" if own else "train"
    columns = {"prompt": "prompt"} if own else {}
    steps_per_epoch = -(-len(read_blocks(work, split, columns)) // BATCH)
    distill = {
        "kind": "distill",
        "losses": [{"kind": "forward_kl", "temperature": 1.0}],
        "epochs": steps / steps_per_epoch,
        "batch_size": BATCH,
        "learning_rate": RATE,
        "dropout": None,
    }
    if own:
        distill["on_policy"] = {"share": 1.0, "new_tokens": WRITTEN, "prompt_tokens": PROMPT}
    spec = load_spec(
        {
            "task": {"kind": "causal_lm", "block_tokens": TOKENS, **columns},
            "teacher": {"model": "teacher"},
            "student": {"kind": "teacher_layers", "keep": KEEP},
            "data": {"train": "wikitext/train"},
            "stages": [{"kind": "answer", "top_k": 64}, distill] if cached else [distill],
            "seed": SEED,
        }
    )
    course, answers = Course(), {}
    for ordinal, stage in enumerate(spec.stages):
        folder = work / f"ours-{ordinal}-{os.getpid()}"
        data = {"data/train.jsonl": work / "in" / "data" / f"{split}.jsonl"}
        lay(folder / "in", {**data, "teacher": work / "in" / "teacher", **answers})
        outputs = run_stage(folder, spec, stage, [], course if stage.kind == "distill" else Course())
        answers = {"answers": outputs / "answers"}
    return load_language_model(outputs / "student"), course


def measure(name: str, work: Path, steps: int) -> dict[str, Any]:
    if name == "trl":
        student, course = run_trl(work, steps)
    elif name == "trl own":
        student, course = run_trl_own(work)
    elif name == "own":
        student, course = run_ours(work, OWN_STEPS, own=True)
    elif name in ("plain", "floor"):
        student, course = run_loop(work, steps, floor=name == "floor")
    else:
        student, course = run_ours(work, steps, cached=name == "cached")
    return {
        "seconds": statistics.median(np.diff(course.ends)[WARM_UP:]),
        "mean_seconds": course.seconds / (len(course.ends) - 1),
        "added_bytes": course.added_bytes,
        "kl": validation_kl(work, student),
        "operations": count_operations(name, student),
    }


def count_operations(name: str, student: Any) -> int:
    """Returns the operations of the products with weights in one step on given texts."""
    config, head = student.config, VOCABULARY * student.config.hidden_size
    own = student.num_parameters() - (1 if config.tie_word_embeddings else 2) * head
    teacher_layers = own * NUM_LAYERS // len(KEEP)
    taught = 0 if name in ("floor", "cached") else 2 * (teacher_layers + head)
    return BATCH * TOKENS * (6 * (own + head) + taught)


def bf16_peak() -> float:
    """Returns the operations a second of a large product of bfloat16 matrices on the GPU."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    ends = []
    for _ in range(13):
        torch.mm(a, b)
        torch.cuda.synchronize()
        ends.append(time.perf_counter())
    return 2 * 8192**3 / statistics.median(np.diff(ends)[3:])


def validation_kl(work: Path, student: Any) -> float:
    teacher, _ = load_pair(work)
    student.to(DEVICE).eval()
    blocks, total, count = read_blocks(work, "validation").head(40 * TOKENS), 0.0, 0
    with torch.inference_mode():
        for batch in blocks.in_order(DEVICE):
            log_p, log_q = (F.log_softmax(m(**batch.inputs).logits[batch.is_row], -1) for m in (teacher, student))
            total += (log_p.exp() * (log_p - log_q)).sum().item()
            count += len(log_p)
    return total / count


def compare(seen: dict[str, dict[str, Any]]) -> dict[str, float]:
    trl, floor, online, cached = (seen[name] for name in ("trl", "floor", "online", "cached"))
    return {
        "online, times faster than trl": trl["seconds"] / online["seconds"],
        "online, added memory over trl's": online["added_bytes"] / trl["added_bytes"],
        "cached, times faster than trl": trl["seconds"] / cached["seconds"],
        "cached, time over the floor's": cached["seconds"] / floor["seconds"],
        "online, KL over trl's": online["kl"] / trl["kl"],
        "own, times faster than trl own": seen["trl own"]["mean_seconds"] / seen["own"]["mean_seconds"],
    }


def show(seen: dict[str, dict[str, Any]]) -> None:
    table = Table("", "s a step", "tokens/s", "MB on top", "validation KL", title=f"{BATCH} × {TOKENS} tokens a step")
    if ON_GPU:
        table.add_column("of the GPU's speed, %")
        peak = bf16_peak()
    for name, row in seen.items():
        seconds, tokens = (row["mean_seconds"], WRITTEN) if "own" in name else (row["seconds"], TOKENS)
        cells = f"{seconds:.3f}", f"{BATCH * tokens / seconds:,.0f}", f"{row['added_bytes'] / 1e6:,.0f}"
        share = [f"{100 * row['operations'] / seconds / peak:.0f}"] if ON_GPU and "own" not in name else []
        table.add_row(name, *cells, f"{row['kl']:.4f}", *share)
    where = f"{torch.cuda.get_device_name()}, {peak / 1e12:.0f} TFLOP/s" if ON_GPU else f"{os.cpu_count()} cores"
    console.print(table, where)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE / "out")
    arguments = parser.parse_args()
    if arguments.only:
        return answer_alone(lambda: measure(arguments.only, arguments.work, arguments.steps))
    if not arguments.data.is_dir():
        console.print(f"no WikiText-2 in {arguments.data}: nothing to measure")
        return 0
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory(prefix="stillhouse-bench-") as folder:
        work = Path(folder)
        prepare(arguments.data, work)
        for _ in range(arguments.rounds):
            for name in CONTENDERS:
                rounds[name].append(measure_alone(__file__, name, work, "--steps", str(arguments.steps)))
    seen = {name: min(found, key=lambda row: row["seconds"]) for name, found in rounds.items()}
    figures = compare(seen)
    show(seen)
    return finish(arguments.out / "causal_lm.json", GOALS, figures, rounds=rounds)


if __name__ == "__main__":
    sys.exit(main())
