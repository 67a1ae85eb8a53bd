"""What the clients of the Hub see of a tenant: its models, data sets and jobs, each as a repository of branches."""

import re
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from app.hub.errors import RepoNotFound, RevisionNotFound
from app.hub.git import commit_oid
from core.datasets.models import Dataset
from core.datasets.repository import find_dataset, list_datasets
from core.errors import Gone, NotFound
from core.jobs.models import Artifact, Job
from core.jobs.repository import get_job, list_artifacts, list_stages, list_succeeded
from core.models.models import Model
from core.models.repository import files_of, find_model, get_manifest, list_manifests, list_models
from core.repos.naming import repo_name
from core.repos.repository import DATASETS, MODELS, find_commit, find_newest
from core.storage import ManifestFile
from core.tenants.keys import Principal

MAIN = "main"
MAIN_ARTIFACTS = ("safetensors", "student", "teacher")  # the first that a job has is its branch `main`
STAGE_OUTPUTS = ("student", "teacher")
JOB_REPO = re.compile(r".*-([0-9a-f]{32})")
WRITES = "text-generation"
PIPELINES = {
    "text_classification": "text-classification",
    "multi_label_classification": "text-classification",
    "text_regression": "text-classification",
    "token_classification": "token-classification",
    "causal_lm": WRITES,
}
HEADS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForCausalLM": WRITES,
    "LMHeadModel": WRITES,
}


class Revision(NamedTuple):
    """The files of one commit."""

    commit: str
    files: list[ManifestFile]


class Repo(NamedTuple):
    """A repository: what its branches hold now.

    Attributes:
        id: `tenant/name`.
        older: The revision that was asked for, if that is a commit that no branch holds any more.
        pipeline: What its models do, as the Hub calls it.
    """

    id: str
    created_at: datetime
    changed_at: datetime
    branches: dict[str, Revision]
    older: Revision | None = None
    pipeline: str | None = None

    def get_revision(self, name: str) -> Revision:
        """Returns the files of a branch or commit. Raises RevisionNotFound."""
        known = [*self.branches.values(), *([self.older] if self.older else [])]
        by_commit = {revision.commit: revision for revision in known}
        found = self.branches.get(name.replace("_", "-")) or by_commit.get(name)
        if found is None:
            there = ", ".join(self.branches) or "none yet"
            raise RevisionNotFound(f"'{self.id}' has no revision '{name}'; its branches: {there}.")
        return found


def get_repo(session: Session, principal: Principal, kind: str, owner: str, name: str, revision: str = MAIN) -> Repo:
    """Returns a repository of the tenant, its branches and, if it has it, that revision. Raises RepoNotFound."""
    found = None
    if owner == principal.tenant_name:
        found = find_stored(session, principal.tenant_id, kind, name, revision)
    if found is None and owner == principal.tenant_name and kind == MODELS:
        job = find_job_named(session, principal.tenant_id, name)
        found = _job_repo(session, job) if job is not None else None
    if found is None:
        raise RepoNotFound(f"There is no repository '{owner}/{name}' among the {kind} of your tenant.")
    return found._replace(id=f"{owner}/{name}")


def find_stored(session: Session, tenant_id: str, kind: str, name: str, revision: str = MAIN) -> Repo | None:
    """Returns the repository of a model or data set, or of what is to become one, or None."""
    row = find_row(session, tenant_id, kind, name)
    newest = find_newest(session, tenant_id, kind, name)
    if newest is not None:
        main = Revision(newest[0].oid, files_of(newest[1]))
        changed_at = newest[0].committed_at
    elif row is not None:
        main = _revision(_files(session, row))
        changed_at = row.created_at
    else:
        return None
    older = find_commit(session, tenant_id, kind, name, revision) if newest and revision != MAIN else None
    return Repo(
        name,
        row.created_at if row else changed_at,
        changed_at,
        {MAIN: main},
        Revision(revision, files_of(older)) if older else None,
        pipeline_of(row.facts["architectures"]) if isinstance(row, Model) else None,
    )


def list_rows(
    session: Session, tenant_id: str, kind: str, after: str | None, limit: int
) -> list[Model | Dataset | Job]:
    """Returns what the tenant's repositories are of, newest first, from the `place_of` one (exclusive).

    Of jobs it is those that have succeeded.
    """
    if kind == DATASETS:
        return [*list_datasets(session, tenant_id, after=after and f"ds_{after}", limit=limit)]
    models = list_models(session, tenant_id, after=after and f"mdl_{after}", limit=limit)
    rows: list[Model | Dataset | Job] = [model for model, _ in models]
    rows += list_succeeded(session, tenant_id, after=after and f"job_{after}", limit=limit)
    return sorted(rows, key=place_of, reverse=True)[:limit]


def place_of(row: Model | Dataset | Job) -> str:
    """Returns the part of a row's id that tells when it was made, whatever it is."""
    return row.id.rpartition("_")[2]


def name_of(row: Model | Dataset | Job) -> str:
    """Returns the name of the repository that is of it."""
    return repo_name(row) if isinstance(row, Job) else row.name


def find_row(session: Session, tenant_id: str, kind: str, name: str) -> Model | Dataset | None:
    """Returns the model or data set of that name, or None."""
    find: Any = {MODELS: find_model, DATASETS: find_dataset}.get(kind, lambda *_: None)
    row: Model | Dataset | None = find(session, tenant_id, name)
    return row if row is not None and row.name == name else None  # it may be found by its id


def _files(session: Session, row: Model | Dataset) -> list[ManifestFile]:
    if isinstance(row, Model):
        return files_of(get_manifest(session, row.tenant_id, row.manifest_id))
    return [
        ManifestFile(path=f"{split}.jsonl", sha256=stored["sha256"], size_bytes=stored["size_bytes"])
        for split, stored in row.splits.items()
    ]


def pipeline_of(architectures: list[str]) -> str | None:
    """Returns what a model does, as the Hub calls it, by the ends of its classes' names."""
    return next((HEADS[end] for name in architectures for end in HEADS if name.endswith(end)), None)


def find_named(session: Session, principal: Principal, name: str) -> Model | Job | None:
    """Returns the tenant's model, or the job whose repository it is, of that name or `tenant/name`, or None."""
    tenant, slash, own = name.rpartition("/")
    if slash and tenant != principal.tenant_name:
        return None
    return find_model(session, principal.tenant_id, own) or find_job_named(session, principal.tenant_id, own)


def find_job_named(session: Session, tenant_id: str, name: str) -> Job | None:
    """Returns the job whose repository has that name, or None."""
    match = JOB_REPO.fullmatch(name)
    try:
        job = get_job(session, tenant_id, f"job_{match.group(1)}") if match else None
    except (NotFound, Gone):
        return None
    return job if job is not None and repo_name(job) == name else None


def _job_repo(session: Session, job: Job) -> Repo:
    """`main` is what a job that has succeeded made to be deployed; each artifact and stage has a branch of its own."""
    artifacts = list_artifacts(session, job.tenant_id, job.id)
    branches = {artifact.name.replace("_", "-"): artifact.manifest_id for artifact in artifacts}
    best = find_main(job, artifacts)
    if best is not None:
        branches = {MAIN: best.manifest_id} | branches
    for stage in list_stages(session, job.tenant_id, job.id) if job.state != "cancelled" else ():
        made = next((stage.outputs[role] for role in STAGE_OUTPUTS if role in stage.outputs), None)
        if made is not None and stage.state in {"succeeded", "cached"}:
            branches[f"stage-{stage.kind.replace('_', '-')}"] = made
    manifests = list_manifests(session, job.tenant_id, branches.values())
    found = {name: _revision(files_of(manifests[manifest_id])) for name, manifest_id in branches.items()}
    changed_at = job.finished_at or job.started_at or job.created_at
    return Repo("", job.created_at, changed_at, found, pipeline=PIPELINES.get(job.spec["task"]["kind"]))


def find_main(job: Job, artifacts: list[Artifact]) -> Artifact | None:
    """Returns what a job that has succeeded made for `transformers`, or None."""
    by_name = {artifact.name: artifact for artifact in artifacts if job.state == "succeeded"}
    return next((by_name[name] for name in MAIN_ARTIFACTS if name in by_name), None)


def _revision(files: list[ManifestFile]) -> Revision:
    return Revision(commit_oid(files), files)
