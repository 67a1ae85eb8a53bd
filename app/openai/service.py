"""Jobs as OpenAI's client makes them."""

import hashlib
import json
from datetime import timedelta
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from app.hub.repos import PIPELINES, WRITES, find_main, find_named, pipeline_of
from app.jobs import service as jobs
from app.jobs.schemas import JobView
from app.openai.requests import FineTuneRequest, make_spec
from app.openai.training_data import Form, find_form, find_source, name_dataset, put_dataset
from core.db import read_scope, session_scope
from core.errors import Invalid
from core.jobs.repository import list_artifacts
from core.jobs.spec import JobSpec, load_spec
from core.models import hub
from core.models.models import Model
from core.models.repository import files_of, get_manifest
from core.openai import repository
from core.openai.models import FineTune
from core.storage import ManifestFile, get_store
from core.tenants.keys import Principal

REPEATED_WITHIN = timedelta(minutes=15)  # the client waits ten for an answer before it asks again
RATES = ("learning_rate", "head_learning_rate")
TRAINING = frozenset({"finetune", "distill"})


class NamedModel(NamedTuple):
    """What a request calls a model: its name in specs, whether it writes texts, and whether it knows a chat's form."""

    ref: str
    writes: bool
    chats: bool


class Created(NamedTuple):
    """A job, the queue that is to hear of it, and whether an earlier request made it."""

    job_id: str
    queue: str
    replayed: bool


def create(principal: Principal, asked: FineTuneRequest, key: str | None, *, is_sent_again: bool) -> Created:
    """Returns the job of a request; one that is sent again, as no answer came, finds the job of the first time.

    Raises Invalid, with the field of the request where it can be told.
    """
    said = asked.model_dump(mode="json", exclude_unset=True)
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    if key is None and is_sent_again:
        with read_scope() as session:
            found = repository.find_repeated(session, principal.tenant_id, digest, REPEATED_WITHIN)
        if found is not None:
            return Created(found.job_id, "", replayed=True)
    with read_scope() as session:
        replayed = jobs.find_replay(session, principal.tenant_id, key, digest)
    if replayed is not None:
        return Created(replayed.view.id, "", replayed=True)
    spec = _make_spec(principal, asked)
    made = jobs.plan(principal, spec)

    def make() -> JobView:
        view = jobs.create(session, principal.tenant_id, spec, made)
        session.add(FineTune(job_id=view.id, tenant_id=principal.tenant_id, request=said, request_sha256=digest))
        return view

    with session_scope() as session:
        accepted = jobs.accept(session, principal.tenant_id, key, digest, make)
    return Created(accepted.view.id, accepted.view.queue, accepted.replayed)


def _make_spec(principal: Principal, asked: FineTuneRequest) -> JobSpec:
    fields = {asked.model: "model"}
    if asked.method.distillation is not None:
        fields.setdefault(asked.method.distillation.teacher, "method.distillation.teacher")
    with read_scope() as session:
        names = {"train": ("training_file", asked.training_file)}
        if asked.validation_file:
            names["validation"] = ("validation_file", asked.validation_file)
        files = {
            split: find_source(session, field, repository.get_file(session, principal.tenant_id, file_id, field=field))
            for split, (field, file_id) in names.items()
        }
        own = {name: _find_model(session, principal, name) for name in fields}
    models = {name: model or _find_elsewhere(name, fields[name]) for name, model in own.items()}
    form = find_form(files["train"])
    named = models[asked.model]
    learns_labels = form == "label" or (form == "completion" and not named.writes)
    data = name_dataset(files, form, learns_labels=learns_labels)
    task = _task(form, named) if not learns_labels else {"kind": "text_classification"}
    spec = load_spec(make_spec(asked, {name: model.ref for name, model in models.items()}, task, data))
    put_dataset(principal.tenant_id, data, files, form, learns_labels=learns_labels)
    return _set_rates(spec, asked)


def _task(form: Form, model: NamedModel) -> dict[str, Any]:
    return {"kind": "causal_lm", "prompt": "prompt", "chat": form == "chat" and model.chats}


def _find_model(session: Session, principal: Principal, name: str) -> NamedModel | None:
    """Returns a model of the tenant, or what one of its jobs made; None for a name of neither."""
    found = find_named(session, principal, name)
    if isinstance(found, Model):
        files = files_of(get_manifest(session, principal.tenant_id, found.manifest_id))
        return NamedModel(name, pipeline_of(found.facts["architectures"]) == WRITES, _knows_chats(files))
    main = find_main(found, list_artifacts(session, principal.tenant_id, found.id)) if found is not None else None
    if found is None or main is None:
        return None
    files = files_of(get_manifest(session, principal.tenant_id, main.manifest_id))
    writes = PIPELINES.get(found.spec["task"]["kind"]) == WRITES
    return NamedModel(f"job:{found.id}/{main.name}", writes, _knows_chats(files))


def _find_elsewhere(name: str, field: str) -> NamedModel:
    """Returns a model of the hub. Raises Invalid for a name that is none of the hub's."""
    if not name.startswith("hub:"):
        raise Invalid(
            f"The model '{name}' is none of yours; push it with `stillhouse models push`, or name one of a hub as "
            "'hub:org/name'.",
            param=field,
        )
    return NamedModel(name, pipeline_of(hub.resolve(name).facts.architectures) == WRITES, chats=True)


def _knows_chats(files: list[ManifestFile]) -> bool:
    by_path = {file.path: file.sha256 for file in files}
    if "chat_template.jinja" in by_path:
        return True
    config = by_path.get("tokenizer_config.json")
    return config is not None and b'"chat_template"' in get_store().get_path(config).read_bytes()


def _set_rates(spec: JobSpec, asked: FineTuneRequest) -> JobSpec:
    """Returns the spec with the default rates of its training multiplied as was asked for."""
    factor = asked.trains().learning_rate_multiplier
    if factor == "auto":
        return spec
    data = spec.model_dump(mode="json")
    for stage in data["stages"][: len(data["stages"]) - len(asked.stages())]:
        if stage["kind"] in TRAINING:
            stage |= {name: stage[name] * factor for name in RATES if stage.get(name) is not None}
    return load_spec(data)
