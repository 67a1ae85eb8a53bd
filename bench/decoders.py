"""What zeros and few bits cost language models, through the HTTP API: perplexity by method, in the order as published.

    python bench/decoders.py [--data DIR] [--models DIR] [--only NAME …] [--epochs N] [--out DIR]

A GPT-2-like and a Llama-like model of 4 layers of width 192 learn WikiText-2 (CC BY-SA, Merity et al. 2016) in a job;
the third model is a real one, the Llama of 260 thousand parameters that writes children's stories (Karpathy, MIT), on
stories that it wrote itself, as what it learned from is not at hand; its 172 neurons are no multiple of 8. From each,
one job a row makes half of the layers' weights zero, or 2 of 4, or 4 of 8, by magnitude, Wanda and SparseGPT; or gives
them 8, 4 and 3 bits with a scale a row, by rounding to the nearest, GPTQ and AWQ. The last rows train one with each
pattern of zeros, and one of 3 bits, for a quarter of an epoch by distillation from what it was. Shown is the perplexity
of the validation split. Without the data the bench says so and ends. Prints a table and writes `decoders.json`. Takes
about an hour and a half on two cores.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from banking77 import SPLITS, local_client, run
from duel import console, finish
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

from stillhouse import Client

SHARED = Path(__file__).parents[2] / "shared"
TOKENS, NUM_STORIES, STORY_TOKENS = 128, {"train": 600, "validation": 100, "test": 8}, 256
MASKS = {"half": {"share": 0.5}, "2:4": {"pattern": "2:4"}, "4:8": {"pattern": "4:8"}}
BITS = (8, 4, 3)
ROWS: dict[str, dict[str, Any]] = {
    f"{name} {kind}": {"kind": "sparsify", "method": {"kind": kind}, **mask}
    for name, mask in MASKS.items()
    for kind in ("magnitude", "wanda", "sparsegpt")
} | {
    f"{bits} bits {kind}": {"kind": "quantize", "method": {"kind": kind}, "bits": bits, "group": None}
    for bits in BITS
    for kind in ("rtn", "gptq", "awq")
}
GOALS = {f"{name}: {kind} over magnitude": (1.0, "below") for name in MASKS for kind in ("wanda", "sparsegpt")}
GOALS |= {f"{bits} bits: {kind} over rtn": (1.0, "below") for bits in BITS[1:] for kind in ("gptq", "awq")}
GOALS |= {"8 bits: gptq over whole": (1.005, "at most")}
RECOVERED = dict.fromkeys(MASKS, "wanda") | {"3 bits": "gptq"}  # what is distilled, of rows of one roughness
GOALS |= {f"{name}: recovered over best of one shot": (1.0, "below") for name in RECOVERED}


def make_models(folder: Path, stories: Path) -> dict[str, Path]:
    """Writes the two models that are to learn; all three have one tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2}
    configs = {
        "gpt2": GPT2Config(**sizes, n_embd=192, n_layer=4, n_head=6, n_positions=TOKENS),
        "llama": LlamaConfig(
            **sizes,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=3,
            max_position_embeddings=TOKENS,
            tie_word_embeddings=True,
        ),
    }
    for name, config in configs.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in configs} | {"stories": stories}


def write_stories(model_folder: Path, folder: Path) -> dict[str, Path]:
    """Writes splits of stories, as the model writes them; returns their files."""
    torch.manual_seed(0)
    model, tokenizer = (kind.from_pretrained(model_folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    files = {}
    for split, count in NUM_STORIES.items():
        start = torch.full((count, 1), model.config.bos_token_id)
        with torch.inference_mode():
            ids = model.generate(start, do_sample=True, top_k=0, max_new_tokens=STORY_TOKENS, pad_token_id=2)
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        files[split] = folder / f"stories-{split}.jsonl"
        files[split].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return files


def measure(client: Client, name: str, base: dict[str, Any], epochs: int) -> dict[str, float]:
    """Returns the perplexity of each row for one model; `base` is what all its jobs have in common."""
    if name != "stories":
        # at a third of the rate, for two epochs, weights stay near what they were drawn as: any zeros cost as much
        stages = [{"kind": "finetune", "epochs": epochs, "learning_rate": 3e-3, "batch_size": 16}]
        job, _ = run(client, base | {"name": f"{name} learns", "stages": stages})
        base = base | {"teacher": {"model": f"job:{job.id}/teacher"}}
    found = {}
    rows = {row: stage for row, stage in ROWS.items() if name != "stories" or stage.get("pattern") != "4:8"}
    for row, stage in rows.items():
        job, _ = run(client, base | {"name": f"{name} {row}", "stages": [stage]})
        seen = job.stages[0].summary
        found |= {"whole": math.exp(seen["validation_before"]["loss"]), row: math.exp(seen["validation"]["loss"])}
        console.print(f"{name} {row}: {found[row]:.3f}, whole {found['whole']:.3f}")
    again = {"kind": "distill", "epochs": 0.25, "learning_rate": 5e-4, "batch_size": 16}
    for row in (f"{rough} {kind}" for rough, kind in RECOVERED.items() if f"{rough} {kind}" in rows):
        job, _ = run(client, base | {"name": f"{name} {row} recovers", "stages": [ROWS[row], again]})
        found[f"{row}, distilled"] = math.exp(job.stages[1].summary["validation"]["loss"])
        console.print(f"{name} {row}, distilled: {found[f'{row}, distilled']:.3f}")
    return found


def compare(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Returns the figure for each goal, of the model that is farthest from it."""
    pairs = {
        f"{name}: {kind} over magnitude": (f"{name} {kind}", f"{name} magnitude")
        for name in MASKS
        for kind in ("wanda", "sparsegpt")
    }
    pairs |= {
        f"{bits} bits: {kind} over rtn": (f"{bits} bits {kind}", f"{bits} bits rtn")
        for bits in BITS[1:]
        for kind in ("gptq", "awq")
    }
    pairs |= {"8 bits: gptq over whole": ("8 bits gptq", "whole")}
    figures = {
        goal: max(rows[over] / rows[under] for rows in found.values() if over in rows)
        for goal, (over, under) in pairs.items()
        if any(over in rows for rows in found.values())
    }
    return figures | {
        f"{name}: recovered over best of one shot": max(
            rows[f"{name} {kind}, distilled"] / min(value for row, value in rows.items() if is_one_shot(row, name))
            for rows in found.values()
            if f"{name} {kind}, distilled" in rows
        )
        for name, kind in RECOVERED.items()
        if any(f"{name} {kind}, distilled" in rows for rows in found.values())
    }


def is_one_shot(row: str, name: str) -> bool:
    """Returns whether a row is one of those of this roughness that were not distilled."""
    return row.startswith(f"{name} ") and not row.endswith(", distilled")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "wikitext2_mini")
    parser.add_argument("--models", type=Path, default=SHARED / "models" / "stories260k")
    names = ["gpt2", "llama", "stories"]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="measure only these models")
    parser.add_argument("--epochs", type=int, default=8, help="of learning WikiText-2")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    arguments = parser.parse_args()
    missing = [path for path in (arguments.data, arguments.models) if not path.is_dir()]
    if missing:
        console.print(f"skipped: there is no {missing[0]}; name the folders with --data and --models")
        return 0
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="stillhouse-bench-") as text:
        folder = Path(text)
        folder.chmod(0o755)  # the embedded Postgres runs as another user when we are root
        models = make_models(folder, arguments.models)
        with local_client(folder) as client:
            client.datasets.push("wikitext", {split: arguments.data / f"{split}.jsonl" for split in SPLITS})
            client.datasets.push("stories", write_stories(arguments.models, folder))
            for name in arguments.only:
                client.models.push(str(models[name]), name)
                base = {
                    "task": {"kind": "causal_lm", "block_tokens": TOKENS},
                    "teacher": {"model": name},
                    "student": {"kind": "teacher_layers", "keep": list(range(5 if name == "stories" else 4))},
                    "data": "stories" if name == "stories" else "wikitext",
                }
                found[name] = measure(client, name, base, arguments.epochs)
    rows = list(dict.fromkeys(row for perplexities in found.values() for row in perplexities))
    table = Table("perplexity", *found, title="Validation split")
    for row in rows:
        table.add_row(row, *(f"{seen[row]:.3f}" if row in seen else "" for seen in found.values()))
    console.print(table)
    figures = compare(found)
    goals = {name: goal for name, goal in GOALS.items() if name in figures}
    return finish(arguments.out / "decoders.json", goals, figures, perplexity=found)


if __name__ == "__main__":
    sys.exit(main())
