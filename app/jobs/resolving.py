"""What a spec's references mean: models and splits, resolved to stored bytes of this tenant, and checked together.

First the rows are read in one short session (`find_sources`); then, without one, files are read and the hub is asked
(`resolve`).
"""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from sqlalchemy.orm import Session

from app.jobs.splits import Problems, add, check_samples, field_of, find_labels, find_split, warn_of_data
from core.changing import ModelStage
from core.datasets.repository import find_dataset
from core.errors import Gone, ModelInvalid, NotFound
from core.jobs.repository import find_artifact, get_job
from core.jobs.spec import JobSpec, spec_invalid
from core.losses import hears_kept
from core.methods import Api, Depths, ModelSource, Problem, Stage, Task
from core.models.facts import TEXT_HEAD, WORD_HEAD, ModelFacts, head_of
from core.models.hub import resolve as resolve_hub
from core.models.outputs import read_output
from core.models.repository import files_of, find_model, get_manifest, list_model_names
from core.models.vocabulary import (
    FILES,
    RELATIONS,
    Relation,
    VocabularyDiffers,
    count_common,
    read_vocabulary,
    relate,
)
from core.settings import get_settings
from core.storage import ManifestFile, get_store
from core.strict import suggest
from core.tenants.keys import Principal
from core.tenants.models import Secret
from core.tenants.secrets import list_secrets

OTHER_STUDENT = (
    "choose a student with the teacher's tokenizer, as its tokens are compared one by one, or a loss that compares "
    "none, as 'uld'"
)
OTHER_LAYERS = "choose a student with the teacher's tokenizer, or leave the losses on layers out"
OTHER_MEMBER = "choose models with the student's tokenizer, as their answers are kept by token"


class Found(NamedTuple):
    """Where a model's files are, and its facts as far as they are known."""

    source: dict[str, Any]
    facts: ModelFacts | None = None
    files: list[ManifestFile] | None = None


class Sources(NamedTuple):
    """Rows that the references name, and what was not found.

    Attributes:
        splits: By path, after the beginning of its fields of a stage that has data of its own.
    """

    models: dict[str, Found]
    splits: dict[str, dict[str, Any]]
    problems: Problems

    def of(self, scope: str, spec: JobSpec) -> dict[str, dict[str, Any]]:
        """Returns the splits that were found of the job, or of one of its stages, by their paths."""
        return {path: self.splits[scope + path] for path in spec.data.refs() if scope + path in self.splits}


class Plan(NamedTuple):
    """A spec whose references are all good; `files` are those of models whose tokens are compared."""

    inputs: dict[str, Any]
    facts: dict[str, ModelFacts]
    warnings: Problems
    files: Mapping[str, list[ManifestFile] | None]


def find_sources(session: Session, principal: Principal, spec: JobSpec) -> Sources:
    """Returns what the spec's references name in the database."""
    problems: Problems = []
    models = {}
    for role, source in spec.models().items():
        model = _find_model(session, principal, source, problems)
        if model:
            if (spec.task.shares_tokens or spec.compares_tokens()) and model.files is None:
                model = model._replace(files=find_files(session, principal.tenant_id, model.source))
            models[role] = model
    find = cache(partial(find_dataset, session, principal.tenant_id))  # most jobs take all splits of one data set
    splits = {}
    for scope, seen in spec.scopes().items():
        for path, ref in seen.data.refs().items():
            split = find_split(session, principal.tenant_id, find, scope + field_of(path), ref, problems)
            if split:
                splits[scope + path] = split
    api = spec.teacher.api()
    if api is not None:
        _check_api(session, principal.tenant_id, api, problems)
    return Sources(models, splits, problems)


def _check_api(session: Session, tenant_id: str, api: Api, problems: Problems) -> None:
    """Adds what keeps workers from asking a teacher's API."""
    if not get_settings().may_ask(api.base_url):
        host = urlsplit(api.base_url).netloc
        why = f"workers may not ask '{host}'; the operator allows hosts with STILLHOUSE_TEACHER_HOSTS"
        add(problems, "teacher.base_url", why)
    if api.secret is not None and session.get(Secret, (tenant_id, api.secret)) is None:
        known = suggest(api.secret, [row.name for row in list_secrets(session, tenant_id)])
        hint = f"{known}; or set it with `stillhouse secrets set {api.secret}`"
        add(problems, "teacher.secret", f"there is no secret '{api.secret}' in your tenant; {hint}")


def _find_model(session: Session, principal: Principal, source: ModelSource, problems: Problems) -> Found | None:
    field, ref = source.field, source.ref
    if ref.startswith("hub:"):
        return Found({"hub": ref})
    if ref.startswith("job:"):
        return _find_output(session, principal.tenant_id, source, problems)
    tenant, slash, name = ref.rpartition("/")
    model = find_model(session, principal.tenant_id, name) if not slash or tenant == principal.tenant_name else None
    if model is None:
        hint = suggest(name, list_model_names(session, principal.tenant_id))
        add(problems, field, f"there is no model '{ref}' in your tenant; {hint}")
        return None
    return Found({"manifest_id": model.manifest_id, "model_id": model.id}, ModelFacts(**model.facts))


def find_files(session: Session, tenant_id: str, source: dict[str, Any]) -> list[ManifestFile] | None:
    """Returns the files of a model as a job's inputs have it; None of one that is not stored here."""
    known = source.get("manifest_id")
    return files_of(get_manifest(session, tenant_id, known), source.get("folder", "")) if known else None


def _find_output(session: Session, tenant_id: str, source: ModelSource, problems: Problems) -> Found | None:
    job_id, name, folder = [*source.ref.removeprefix("job:").split("/"), "", ""][:3]
    name = name or "student"
    try:
        job = get_job(session, tenant_id, job_id)
    except (NotFound, Gone) as error:
        add(problems, source.field, error.message)
        return None
    artifact = find_artifact(session, tenant_id, job_id, name)
    if job.state != "succeeded" or artifact is None:
        why = f"has no artifact '{name}'" if job.state == "succeeded" else f"is {job.state}, not succeeded"
        add(problems, source.field, f"the job '{job_id}' {why}")
        return None
    manifest = get_manifest(session, tenant_id, artifact.manifest_id)
    files = files_of(manifest, folder)
    if not files:
        known = suggest(folder, {file.path.partition("/")[0] for file in files_of(manifest) if "/" in file.path})
        add(problems, source.field, f"the artifact '{name}' of the job '{job_id}' has no folder '{folder}'; {known}")
        return None
    return Found({"manifest_id": manifest.id, "job_id": job_id, "folder": folder}, files=files)


def resolve(spec: JobSpec, sources: Sources) -> Plan:
    """Returns the plan of a spec. Raises SpecInvalid with every problem, Unavailable when the hub does not answer."""
    problems = list(sources.problems)
    models, facts = describe_models(spec, sources, problems)
    labels = {}
    for scope, seen in spec.scopes().items():
        labels[scope], found = find_labels(seen, sources.of(scope, seen))
        problems += _inside(scope, found)
    problems += check_samples(spec, sources.splits)
    if any(labels[""].values()):
        problems += _check_known_labels(spec, facts, labels[""])
    if problems:
        raise spec_invalid(problems)
    kept = ("sha256", "size_bytes", "num_rows", "dataset_id", "split")
    inputs = {
        **models,
        "data": {path: {key: split[key] for key in kept} for path, split in sources.splits.items()},
        **{f"{scope}labels": _join(found) for scope, found in labels.items()},
    }
    files = {role: model.files for role, model in sources.models.items()}
    return Plan(inputs, facts, _warnings(spec, sources) + _warn_of_head(spec, facts, labels[""]), files)


def _inside(scope: str, problems: Problems) -> Problems:
    """Returns problems with the task or the data of the job, or of one of its stages, as those of the whole spec."""
    return [problem | {"field": scope + problem["field"]} for problem in problems]


def _join(labels: dict[str, list[str]]) -> list[str]:
    """Returns the labels of one task, or those of several, each after its task's name."""
    return [f"{part}/{label}" if part else label for part, names in labels.items() for label in names]


def describe_models(
    spec: JobSpec, sources: Sources, problems: Problems
) -> tuple[dict[str, Any], dict[str, ModelFacts]]:
    """Returns what a job's `inputs` hold of its models, and their facts; adds what makes the student impossible."""
    named = spec.models()
    found = {role: _describe(named[role].field, model, problems) for role, model in sources.models.items()}
    facts = {role: model.facts for role, model in found.items() if model and model.facts}
    problems += check_models(spec, facts)
    problems += check_vocabularies(spec, {role: model.files for role, model in found.items() if model})
    inputs = {role: model.source for role, model in found.items() if model}
    return inputs | {f"{role}_facts": known.model_dump() for role, known in facts.items()}, facts


def check_models(spec: JobSpec, facts: dict[str, ModelFacts]) -> Problems:
    """Returns what models with these facts, by role, make impossible of the student or of a stage."""
    start = facts.get(spec.starts_from)
    unfit = _check_student(spec, start) if start else []
    problems = unfit or (_check_depths(spec, facts) if "teacher" in facts and spec.teacher.is_model else [])
    problems += _check_layered(spec, start) if start and not unfit else []
    problems += _check_blocks(spec, facts)
    starts = {index: facts.get(_start_of(spec, stage)) for index, stage in enumerate(spec.stages)}
    return problems + _of_stages([(i, spec.stages[i].check_model(spec, f)) for i, f in starts.items() if f])


def _start_of(spec: JobSpec, stage: Stage) -> str:
    """Returns the role of the model from which the one starts that a stage changes, or else the student."""
    return spec.starts_from if getattr(stage, "role", "student") == "student" else "teacher"


def _check_known_labels(spec: JobSpec, facts: dict[str, ModelFacts], labels: dict[str, list[str]]) -> Problems:
    """Returns which models have other labels that no stage trains: a teacher's several, and those of tasks alone."""
    problems: Problems = []
    for role in sorted(facts.keys() - {"teacher", "base"}):
        source = spec.models()[role]
        wanted = labels[source.part] if source.part else _join(labels)
        why = _say_other_labels(facts[role], spec.task_named(source.part), wanted)
        if why:
            add(problems, source.field, f"{why}; name a model that was fine-tuned on these")
    return problems


def _say_other_labels(known: ModelFacts, task: Task, wanted: list[str]) -> str:
    """Returns that a model has other labels than these, in any order, or gives them to words where texts have them.

    Nothing where it has them.
    """
    is_of_words = task.kind == "token_classification"
    other = TEXT_HEAD if is_of_words else WORD_HEAD
    if task.kind != "multi_task" and other in map(head_of, known.architectures):
        mine, its = ("words", "texts") if is_of_words else ("texts", "words")
        return f"it is a {known.architectures[0]}, which gives labels to {its} and not to {mine}"
    found = known.labels or []
    shown = ", ".join(found[:10]) or "none"
    return "" if sorted(found) == sorted(wanted) else f"its labels ({shown}) are not those of the data"


def _warn_of_head(spec: JobSpec, facts: dict[str, ModelFacts], labels: dict[str, list[str]]) -> Problems:
    """Returns whether a teacher that is heard, and that no stage trains, has no head for the labels of the data."""
    is_trained = any(stage.trains and "teacher" in stage.writes() for stage in spec.stages)
    is_heard = any(not loss.is_of_labels for stage in spec.stages for loss in getattr(stage, "losses", ()))
    wanted = _join(labels)
    if "teacher" not in facts or not spec.teacher.is_model or is_trained or not is_heard or not wanted:
        return []
    why = _say_other_labels(facts["teacher"], spec.task, wanted)
    hint = "so its answers will be random; put a 'finetune' first, or name a model that was fine-tuned on these"
    return [{"field": "teacher.model", "message": f"{why}, {hint}"}] if why else []


def _check_student(spec: JobSpec, start: ModelFacts) -> Problems:
    """Returns what makes the spec's student impossible, made of that model."""
    unfit = [{"field": f"student.{p.field}", "message": p.message} for p in spec.student.check(start)]
    return unfit or _check_sharing(spec, start)


def _check_sharing(spec: JobSpec, start: ModelFacts) -> Problems:
    """Returns whether tasks are to share all layers of a student that starts from that model, and yet have others."""
    count, shared = spec.student.count_layers(start), spec.task.shared_layers
    if count is None or shared is None or shared < count:
        return []
    why = f"the student has {count} layers, and with all of them shared none is a task's own; choose fewer, or 'all'"
    return [{"field": "task.shared", "message": why}]


def _check_layered(spec: JobSpec, start: ModelFacts) -> Problems:
    """Returns what stages cannot do with a student that starts from that model and stores some of its layers once."""
    if not spec.student.reuses_layers(start):
        return []
    stages = [(n, s) for n, s in enumerate(spec.stages) if isinstance(s, ModelStage) and s.role == "student"]
    why = f"it needs each layer alone, and those of a '{spec.student.kind}' student have the same weights; leave it out"
    why += ", or choose another kind of student"
    return _of_stages([(n, [Problem(field, why) for field in stage.layered()]) for n, stage in stages])


def _check_depths(spec: JobSpec, facts: dict[str, ModelFacts]) -> Problems:
    """Returns what is wrong with stages that compare layers, as far as it is known how many and how wide these are."""
    start, teacher, wide = facts.get(spec.starts_from), facts["teacher"].num_layers, facts["teacher"].widths
    stages = [(n, s) for n, s in enumerate(spec.stages) if isinstance(s, ModelStage)]
    if facts["teacher"].reuses_layers:
        why = "the teacher's layers have the same weights, and are not compared; leave the losses on layers out"
        return _of_stages([(n, [Problem("losses", why)]) for n, s in stages if getattr(s, "feature_losses", ())])
    if not start or not teacher:
        return []
    found = []
    for number, stage in stages:
        sizes = stage.sizes_before(spec, start)
        if sizes.num_layers:
            widths = (sizes.widths, wide) if sizes.widths and wide else None
            depths = Depths(sizes.num_layers, teacher, sizes.may_be_shallower, widths)
            found.append((number, stage.check_depths(spec, depths)))
    return _of_stages(found)


def _check_blocks(spec: JobSpec, facts: dict[str, ModelFacts]) -> Problems:
    """Returns whether answers are kept to longer or shorter blocks than those in which the student hears them."""
    longest: int | None = getattr(spec.task, "block_tokens", None)
    later = [spec.stages[n + 1 :] for n, stage in enumerate(spec.stages) if "answers" in stage.writes()]
    if longest is None or "base" not in facts or not any(map(hears_kept, later)):
        return []
    readers = ["base"], spec.teacher.sources()
    places = [[facts[role].num_positions for role in roles if role in facts] for roles in readers]
    student, teacher = (min([longest, *filter(None, some)]) for some in places)
    if student == teacher:
        return []
    why = f"the student reads blocks of {student} tokens, and answers would be kept to blocks of {teacher}; "
    return [{"field": "task.block_tokens", "message": f"{why}set it to {min(student, teacher)}"}]


def _of_stages(found: list[tuple[int, list[Problem]]]) -> Problems:
    return [{"field": f"stages.{n}.{p.field}", "message": p.message} for n, some in found for p in some]


def check_vocabularies(spec: JobSpec, files: Mapping[str, list[ManifestFile] | None]) -> Problems:
    """Returns which models, by the files of each role, do not choose among the student's tokens though they have to."""
    problems: Problems = []
    if spec.compares_tokens() and "base" in files:
        for role in spec.teacher.sources():
            hint = OTHER_STUDENT if spec.task.shares_tokens else OTHER_LAYERS
            wrong, why = ("base", hint) if spec.teacher.is_model else (role, OTHER_MEMBER)
            problems += _check_vocabulary(spec.models()[wrong].field, why, files.get(role), files["base"])
    return problems


def _check_vocabulary(field: str, hint: str, *models: list[ManifestFile] | None) -> Problems:
    """Returns what keeps two models from choosing among the same tokens, as far as their tokenizers are stored here."""
    try:
        first, second = map(_read_vocabulary, models)
        if first is not None and second is not None:
            count_common(first, second)
    except (VocabularyDiffers, ValueError) as error:
        return [{"field": field, "message": f"{error}; {hint}"}]
    return []


def relate_vocabularies(spec: JobSpec, made: Plan) -> Relation | None:
    """Returns whether the student has the teacher's tokens, of several models the least that is true of one.

    It is None of models that choose among no tokens, and where one is not stored here in a form that is read.
    """
    if not spec.task.shares_tokens:
        return None
    roles, own = spec.teacher.sources(), spec.starts_from
    try:
        known = {role: _read_vocabulary(made.files.get(role)) for role in {*roles, own}}
    except ValueError:
        return None
    found: list[Relation] = []
    for role in roles:
        teacher, student = known[role], known[own]
        if teacher is None or student is None:
            return None
        num_logits = (made.facts[name].vocab_size for name in (role, own))
        found.append(relate(teacher, student, *filter(None, num_logits)))
    return max(found, key=RELATIONS.index, default=None)


def _read_vocabulary(files: list[ManifestFile] | None) -> dict[str, int] | None:
    """Returns ids by token of a model; None of one that is not stored here, or in a form that is not read."""
    return read_vocabulary(
        {f.path: get_store().get_path(f.sha256).read_bytes() for f in files or [] if f.path in FILES}
    )


def _describe(field: str, model: Found, problems: Problems) -> Found | None:
    """Adds the facts of a model that is not a stored one: one of the hub, or another job's output."""
    if model.facts is not None:
        return model
    try:
        if model.files is not None:
            return model._replace(facts=read_output(model.files))
        found = resolve_hub(model.source["hub"])
    except ModelInvalid as error:
        add(problems, field, error.message)
        return None
    return Found({"hub": {"repo": found.repo, "commit": found.commit}}, found.facts)


def _warnings(spec: JobSpec, sources: Sources) -> Problems:
    warnings = _of_stages([(ordinal, stage.advise(spec)) for ordinal, stage in enumerate(spec.stages)])
    for scope, seen in spec.scopes().items():
        warnings += _inside(scope, warn_of_data(seen, sources.of(scope, seen)))
    return warnings
