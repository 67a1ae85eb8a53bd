"""The web page in a real Chromium, on a real stack: by mouse, by keyboard, with much in it, with what is hostile."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from core.db import session_scope
from tests import pico
from tests.e2e.browsing import (
    AXE,
    CHROMIUM,
    WAIT_MS,
    browsing,
    check_access,
    enter,
    heading,
    shoot,
    tab_to,
    view,
    visiting,
)
from tests.e2e.stack import LONG, Stack, free_port

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not there; `make browser` fetches it")
expect = playwright.expect
expect.set_options(timeout=WAIT_MS)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is installed"),
    pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not there; `make browser` fetches it"),
]
log = logging.getLogger(__name__)
SPLITS = ("train", "validation", "test")
HOSTILE = '<img src="x" onerror="window.hacked = 1">'
MANY = 10_000
TEXT = "my parcel is late"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as found:
        yield found


class Up:
    """`stillhouse up` on a folder where nothing was before."""

    def __init__(self, folder: Path) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("STILLHOUSE_")}
        command = [
            sys.executable,
            "-m",
            "stillhouse",
            "up",
            "--data-dir",
            str(folder),
            "--port",
            str(free_port()),
            "--json",
        ]
        self.log = folder.with_suffix(".log").open("wb")
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.log, text=True, env=clean | {"STILLHOUSE_POLL_S": "1"}
        )
        assert self.process.stdout
        self.facts = json.loads(self.process.stdout.readline())

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate()
        self.log.close()


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    found = Up(tmp_path_factory.mktemp("up") / "data")
    try:
        yield found.facts
    finally:
        found.stop()


def choose(page: Any, label: str, path: Path) -> None:
    """Chooses a file, or a folder, with the dialog that a click opens."""
    with page.expect_file_chooser() as chooser:
        page.get_by_label(label, exact=True).click()
    chooser.value.set_files(path)


def answers_of(folder: Path) -> dict[str, float]:
    """Returns what stock `transformers` says of the text, in percent as the page writes it."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        p_C = model(**AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")).logits[0].softmax(-1)
    return {model.config.id2label[index]: 100 * p for index, p in enumerate(p_C.tolist())}


def read_answer(page: Any, role: str) -> dict[str, float]:
    rows = page.locator("article").first.get_by_label(role, exact=True).get_by_role("listitem").all_inner_texts()
    return {label: float(share) for label, share in (row.removesuffix(" %").split("\n") for row in rows)}


def download(page: Any, name: str, to: Path) -> Path:
    with page.expect_download() as saved:
        page.get_by_role("button", name=f"Download all as one tar: {name}", exact=True).click()
    raw = Path(saved.value.path()).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        archive.extractall(to, filter="data")
    return to / name


def test_from_an_empty_database_to_a_tried_text_by_mouse_alone(
    browser: Any, up: dict[str, Any], pico_files: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    model, splits = pico_files
    with visiting(browser, up["page"]) as page:
        heading(page, "Jobs")
        expect(page.get_by_text("There is no such job.")).to_be_visible()
        check_access(page, "empty")
        view(page, "Models")
        choose(page, "Folder", model)
        page.get_by_role("button", name="Upload").click()
        heading(page, f"local/{model.name}")
        check_access(page, "model")
        view(page, "Data sets")
        for split in SPLITS:
            choose(page, split, splits[split])
        page.get_by_role("button", name="Upload").click()
        heading(page, "data")
        expect(page.get_by_role("row")).to_have_count(1 + 3 + 1 + 10)  # of the splits, and of the first rows
        check_access(page, "dataset")
        shoot(page, "dataset")
        view(page, "New job")
        page.get_by_role("button", name="Add to keep").click()
        page.get_by_role("button", name="Check").click()
        expect(page.get_by_text("The spec is good.")).to_be_visible()
        check_access(page, "new")
        page.get_by_role("button", name="Submit").click()
        heading(page, "job")
        expect(page.locator(".badge").first).to_have_text("running")
        expect(page.locator(".badge").first).to_have_text("succeeded")  # the page was not loaded again
        expect(page.get_by_role("list").filter(has_text="job.succeeded")).to_be_visible()
        expect(page.get_by_role("button", name="Download all as one tar: report")).to_be_visible()
        check_access(page, "job")
        folders = {role: download(page, role, tmp_path) for role in ("teacher", "student")}
        page.get_by_role("link", name="Try it", exact=True).last.click()
        heading(page, "Try it")
        page.get_by_label("Text", exact=True).fill(TEXT)
        page.get_by_role("button", name="Ask both").click()
        expect(page.locator("article")).to_be_visible()
        for role, folder in folders.items():
            assert read_answer(page, role) == pytest.approx(answers_of(folder), abs=0.06), role
        check_access(page, "try")
        view(page, "Quality against size")
        marks = page.locator("figure").get_by_role("link")
        expect(marks).to_have_count(5)  # teacher, student and three forms
        marks.last.hover(force=True)
        expect(page.locator(".said")).to_contain_text("of job: accuracy")
        check_access(page, "results")
        view(page, "Jobs")
        expect(page.locator(".jobs tbody a")).to_have_count(1)  # a tried text is left out
        page.get_by_label("Tried texts, too").click()
        expect(page.locator(".jobs tbody a")).to_have_count(2)
        view(page, "Methods")
        check_access(page, "methods")
        page.get_by_role("link", name="distill", exact=True).click()
        heading(page, "distill, of the stages")
        check_access(page, "method")
        shoot(page, "method")
        assert page.evaluate("performance.getEntriesByType('navigation').length") == 1
        assert page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 1]


def test_the_same_by_keyboard_alone(browser: Any, stack: Stack, worker: Any) -> None:
    with visiting(browser, str(stack.http.base_url)) as page:
        heading(page, "Your API key")
        check_access(page, "key")
        tab_to(page, page.get_by_label("API key"))
        page.keyboard.type(stack.http.headers["Authorization"].removeprefix("Bearer "))
        tab_to(page, page.get_by_label("Remember it"))
        page.keyboard.press("Space")
        page.keyboard.press("Enter")
        heading(page, "Jobs")
        page.reload()
        heading(page, "Jobs")  # as the key is remembered
        tab_to(page, page.get_by_role("link", name="New job"))
        page.keyboard.press("Enter")
        heading(page, "New job")
        assert page.evaluate("document.activeElement.tagName") == "H1"
        tab_to(page, page.get_by_label("name (your", exact=False).or_(page.get_by_label("name", exact=True)))
        page.keyboard.press("Control+A")
        page.keyboard.type("typed")
        shoot(page, "new")
        tab_to(page, page.get_by_label("Choose the stages"))
        page.keyboard.press("Space")
        for kind in ("finetune", "distill"):
            stage = page.get_by_role("group", name=kind, exact=True)
            tab_to(page, stage.locator("summary").first)
            page.keyboard.press("Enter")
            for field, value in (("epochs", 10), ("learning rate", 0.004), ("head learning rate", 0.02)):
                tab_to(page, stage.get_by_label(field, exact=True))
                page.keyboard.press("Control+A")
                page.keyboard.type(str(value))
        check_access(page, "settings")
        tab_to(page, page.get_by_role("button", name="Submit"))
        page.keyboard.press("Enter")
        heading(page, "typed")
        expect(page.locator(".badge").first).to_have_text("succeeded")
        expect(page.get_by_role("button", name="Download all as one tar: report")).to_be_visible()
        shoot(page, "job")
        page.get_by_role("heading", level=1).focus()
        tab_to(page, page.get_by_role("main").get_by_role("link", name="Try it"))
        page.keyboard.press("Enter")
        heading(page, "Try it")
        tab_to(page, page.get_by_label("Text", exact=True))
        page.keyboard.type(TEXT)
        tab_to(page, page.get_by_role("button", name="Ask both"))
        page.keyboard.press("Enter")
        expect(page.locator("article")).to_be_focused()
        assert next(iter(read_answer(page, "student"))) == "delivery"
        shoot(page, "try")
        tab_to(page, page.get_by_role("link", name="Quality against size"))
        page.keyboard.press("Enter")
        mark = page.locator("figure").get_by_role("link").first
        tab_to(page, mark)
        expect(page.locator(".said")).to_contain_text("teacher of typed: accuracy")
        shoot(page, "results")
        tab_to(page, page.get_by_role("button", name="Forget the key"))
        page.keyboard.press("Enter")
        heading(page, "Your API key")
        assert page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 0]


def test_a_job_is_paused_resumed_and_cancelled(browser: Any, stack: Stack, worker: Any) -> None:
    job_id = stack.submit(stages=LONG, name="long")
    with visiting(browser, str(stack.http.base_url)) as page:
        enter(page, stack.http.headers["Authorization"].removeprefix("Bearer "))
        breaks = iter([True, True])
        page.route(f"**/{job_id}/events", lambda route: route.abort() if next(breaks, False) else route.continue_())
        expect(page.locator(".jobs .badge")).to_have_text("running")
        expect(page.locator(".jobs progress")).to_be_visible()
        page.get_by_role("link", name="long").click()
        state = page.locator(".badge").first
        expect(state).to_have_text("running")
        check_access(page, "running job")
        for order, reached in (("pause", "paused"), ("resume", "running"), ("cancel", "cancelled")):
            page.get_by_role("button", name=order, exact=True).click()
            expect(state).to_have_text(reached)
            expect(page.locator(".events").get_by_text(f"job.{reached}").first).to_be_visible()  # the stream goes on
        check_access(page, "cancelled job")
        page.get_by_role("button", name="retry").click()
        page.wait_for_url(lambda url: job_id not in url)
        expect(page.get_by_role("link", name="another job")).to_have_attribute("href", f"#/jobs/{job_id}")
        page.get_by_role("button", name="cancel").click()
        expect(state).to_have_text("cancelled")
        page.on("dialog", lambda asked: asked.accept())
        page.get_by_role("button", name="delete").click()
        heading(page, "Jobs")
        expect(page.locator(".jobs .badge")).to_have_count(1)
        for lists in ("Models", "Data sets"):
            view(page, lists)
            expect(page.get_by_role("row")).to_have_count(2)
            check_access(page, lists)


KINDS = {
    "text_regression": ("sizes", {"value": "size"}, ".value"),
    "token_classification": ("entities", {}, ".tagged"),
    "causal_lm": ("walks", {"block_tokens": 32}, ".continuation"),
}


def write_sizes(folder: Path) -> dict[str, Path]:
    """Writes splits of texts with a number, and returns their paths by name."""
    paths = pico.write_data(folder)
    for path in paths.values():
        texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({"text": text, "size": len(text) / 40}) + "\n" for text in texts))
    return paths


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_answer_is_shown(browser: Any, stack: Stack, worker: Any, tmp_path: Path, kind: str) -> None:
    data, settings, place = KINDS[kind]
    stack.push_data(
        {"sizes": write_sizes, "entities": pico.write_entities, "walks": pico.write_walks}[data](tmp_path), data
    )
    model = "pico"
    if kind == "causal_lm":
        model = "lm"
        stack.push_model(pico.write_language_model(tmp_path / model), model)
    stages = [{"kind": "finetune", "of": role, "epochs": 1} for role in ("teacher", "student")]
    job_id = stack.submit(teacher={"model": model}, task={"kind": kind, **settings}, data=data, stages=stages)
    assert stack.wait(job_id)["state"] == "succeeded"
    with visiting(browser, str(stack.http.base_url)) as page:
        enter(page, stack.http.headers["Authorization"].removeprefix("Bearer "))
        view(page, "Try it")
        page.get_by_label("Text", exact=True).fill(TEXT)
        page.get_by_role("button", name="Ask both").click()
        expect(page.locator(f"article {place}")).to_have_count(2)
        [tried] = stack.http.get("/v1/jobs", params={"metadata": f"try_of:{job_id}"}).json()["data"]
        [row] = stack.http.get(f"/v1/jobs/{tried['id']}/artifacts/predictions/predictions.json").json()
        shown = [found.text_content() for found in page.locator(f"article {place}").all()]
        assert shown == [SHOWN[kind](row[role]) for role in ("teacher", "student")]
        check_access(page, f"try {kind}")


def _tagged(answer: dict[str, Any]) -> str:
    found = [f"{one['word']}{'' if one['label'] == 'O' else ' ' + one['label']}" for one in answer["words"]]
    return "".join(f"{one} " for one in found)


SHOWN = {
    "text_regression": lambda answer: f"{answer['value']:.4g}",
    "token_classification": _tagged,
    "causal_lm": lambda answer: answer["continuation"] + (" …" if answer["is_cut"] else ""),
}


def test_a_search_shows_its_points(browser: Any, stack: Stack, worker: Any) -> None:
    train = {"epochs": 10, "learning_rate": 4e-3, "head_learning_rate": 2e-2}
    search = {"kind": "search", "min_retained": 0.5, "max_trials": 2, "distill": train}
    job_id = stack.submit(student={"kind": "searched"}, stages=[{"kind": "finetune", **train}, search])
    with visiting(browser, str(stack.http.base_url)) as page:
        enter(page, stack.http.headers["Authorization"].removeprefix("Bearer "))
        page.get_by_role("link", name="job", exact=True).click()
        expect(page.locator(".badge").first).to_have_text("succeeded")
        points = stack.http.get(f"/v1/jobs/{job_id}/pareto").json()["data"]
        assert points
        expect(page.locator("figure.large").get_by_role("link")).to_have_count(len(points))
        expect(page.locator("figure.large .mark.student")).to_have_count(sum(point["on_front"] for point in points))
        check_access(page, "search")


def test_what_the_server_refuses_is_said_at_its_field(browser: Any, stack: Stack) -> None:
    with visiting(browser, str(stack.http.base_url)) as page:
        page.get_by_label("API key").fill("sk_wrong")
        page.get_by_role("button", name="Open").click()
        expect(page.get_by_role("alert")).to_contain_text("API key")
        enter(page, stack.http.headers["Authorization"].removeprefix("Bearer "))
        view(page, "New job")
        page.get_by_role("spinbutton", name="keep 1").fill("7")
        page.get_by_label("Choose the stages").check()
        distill = page.get_by_role("group", name="distill", exact=True)
        distill.get_by_text("Settings (").click()
        distill.get_by_label("batch size", exact=True).fill("0")
        page.get_by_role("button", name="Check").click()
        wrong = distill.get_by_label("batch size", exact=True)
        expect(wrong).to_have_attribute("aria-invalid", "true")
        expect(wrong).to_be_focused()
        expect(wrong).to_have_accessible_description(
            f"{_hint('distill', 'batch_size')} Input should be greater than or equal to 1"
        )
        wrong.fill("8")
        page.get_by_role("button", name="Submit").click()
        expect(page.get_by_text("the teacher has 3 layers", exact=False).first).to_be_visible()
        page.get_by_label("What to make").select_option("target")
        page.get_by_label("data, written as").select_option("splits")
        page.get_by_role("textbox", name="data", exact=True).fill(
            '{"train": "toy/train", "validation": "toy/validation", "test": "toy/nothing"}'
        )
        more = page.get_by_role("group", name="the job", exact=True)
        more.get_by_text("Settings (").click()
        more.get_by_label("max seconds").fill("900")
        page.get_by_role("button", name="Check").click()
        expect(page.get_by_role("textbox", name="data", exact=True)).to_be_focused()
        page.get_by_role("textbox", name="data", exact=True).fill(
            '{"train": "toy/train", "validation": "toy/validation", "test": "toy/test"}'
        )
        page.get_by_role("button", name="Check").click()
        expect(page.get_by_text("The spec is good.")).to_be_visible()
        page.get_by_label("Written as", exact=True).select_option("JSON")
        spec = json.loads(page.locator("pre[aria-label='The spec']").inner_text())
        read = stack.http.post("/v1/jobs/validate", json=spec).json()["spec"]
        assert (read["student"], read["max_seconds"], read["data"]["test"]) == ({"kind": "searched"}, 900, "toy/test")
        assert stack.http.get("/v1/jobs").json()["data"] == []


def test_the_colours_are_those_of_the_system_or_of_choice(browser: Any, stack: Stack) -> None:
    paper = "() => getComputedStyle(document.documentElement).backgroundColor"
    with visiting(browser, str(stack.http.base_url), color_scheme="dark") as page:
        dark = page.evaluate(paper)
        page.get_by_label("Colours").select_option("light")
        light = page.evaluate(paper)
        assert light != dark
        page.reload()
        expect(page.get_by_label("Colours")).to_have_value("light")
        assert page.evaluate(paper) == light


def _hint(kind: str, field: str) -> str:
    from core.registry import list_methods

    return (
        f"{list_methods('stages')[kind].model_fields[field].description} Give a whole number, at least 1, at most 4096."
    )


def fill_jobs(tenant_id: str, count: int) -> None:
    """Adds jobs that have ended, one with a name that the API would refuse."""
    rows = text("""
        insert into jobs (id, tenant_id, name, labels, spec, spec_sha256, inputs, queue, state, finished_at)
        select 'job_' || md5(:tenant) || '-' || lpad(n::text, 8, '0'), :tenant,
            case when n = :count / 2 then :hostile else 'job ' || n end, '{}', '{}', '', '{}', 'nowhere',
            (array['succeeded', 'failed', 'cancelled'])[1 + n % 3], now()
        from generate_series(1, :count) n
    """)
    with session_scope() as session:
        session.execute(rows, {"tenant": tenant_id, "count": count, "hostile": HOSTILE})


def test_ten_thousand_jobs_stay_smooth(browser: Any, api: Stack, tenant: tuple[str, str]) -> None:
    fill_jobs(tenant[0], MANY)
    with visiting(browser, str(api.http.base_url)) as page:
        enter(page, tenant[1])
        page.evaluate(OBSERVE)
        last = page.get_by_role("link", name="job 1", exact=True)
        most, frames = 0, 0
        while not last.is_visible():
            most = max(most, page.evaluate("document.querySelectorAll('*').length"))
            page.locator(".list").evaluate(SCROLL)
            frames += 1
            assert frames < MANY / 10, page.locator(".hint").first.inner_text()
        log.info("%d times scrolled, at most %d elements, long tasks in ms: %s", frames, most, page.evaluate("long"))
        assert page.locator(".jobs").get_attribute("aria-rowcount") == str(MANY + 1)
        assert last.locator("xpath=ancestor::tr").get_attribute("aria-rowindex") == str(MANY + 1)
        assert most < 800
        page.locator(".list").evaluate("list => { list.scrollTop = 0; }")
        expect(page.get_by_role("link", name=f"job {MANY}")).to_be_visible()
        check_access(page, "jobs")
        shoot(page, "jobs")
        name = page.get_by_label("Whole name")
        name.fill(HOSTILE)
        name.press("Enter")
        expect(page.locator(".jobs tbody a")).to_have_count(1)
        expect(page.get_by_role("link", name=HOSTILE)).to_be_visible()
        assert page.evaluate("window.hacked") is None
        name.fill("")
        name.press("Enter")
        page.get_by_label("State").select_option("failed")
        expect(page.locator(".jobs .badge.succeeded")).to_have_count(0)
        expect(page.locator(".jobs .badge.failed").first).to_be_visible()


OBSERVE = """() => {
  window.long = [];
  new PerformanceObserver(list => long.push(...list.getEntries().map(one => one.duration))).observe({type: "longtask"});
}"""
SCROLL = """list => new Promise(done => {
  list.scrollTop += 20 * list.clientHeight;
  requestAnimationFrame(() => requestAnimationFrame(done));
})"""


def test_what_is_hostile_is_text(browser: Any, stack: Stack, worker: Any) -> None:
    rows = [{"text": f"{HOSTILE} {word}", "label": label} for word in ("a", "b") for label in (HOSTILE, "plain")]
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    files = [(split, (f"{split}.jsonl", data)) for split in SPLITS]
    assert stack.http.post("/v1/datasets", data={"name": "hostile"}, files=files).status_code == 201
    job_id = stack.submit(data="hostile", stages=[{"kind": "distill", "epochs": 1}])
    stack.wait(job_id)
    with visiting(browser, str(stack.http.base_url)) as page:
        enter(page, stack.http.headers["Authorization"].removeprefix("Bearer "))
        page.goto(f"{stack.http.base_url}/#/datasets/hostile")
        expect(page.get_by_role("cell", name=HOSTILE, exact=True).first).to_be_visible()
        page.goto(f"{stack.http.base_url}/#/jobs/{job_id}")
        page.get_by_text("The spec with all defaults").click()
        page.goto(f"{stack.http.base_url}/#/try/{job_id}")
        page.get_by_label("Text", exact=True).fill(HOSTILE)
        page.get_by_role("button", name="Ask both").click()
        expect(page.locator("blockquote")).to_have_text(HOSTILE)
        assert set(read_answer(page, "student")) == {HOSTILE, "plain"}
        page.goto(f"{stack.http.base_url}/#/jobs/{HOSTILE}")
        expect(page.get_by_role("alert").first).to_contain_text("There is no job")
        assert page.locator("img").count() == 0
        assert page.evaluate("window.hacked") is None
