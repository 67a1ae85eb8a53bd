"""What the clients of the Hub see of a tenant: its models, data sets and jobs, each as a repository of branches."""

import re
from datetime import datetime
from typing import NamedTuple

from sqlalchemy.orm import Session

from app.hub.errors import RepoNotFound, RevisionNotFound
from app.hub.git import commit_oid
from core.datasets.models import Dataset
from core.datasets.repository import find_dataset
from core.errors import Gone, NotFound
from core.jobs.models import Job
from core.jobs.repository import get_job, list_artifacts, list_stages
from core.models.repository import files_of, find_model, get_manifest, list_manifests
from core.storage import ManifestFile
from core.tenants.keys import Principal

MODELS, DATASETS = "models", "datasets"
MAIN = "main"
MAIN_ARTIFACTS = ("safetensors", "student", "teacher")  # the first that a job has is its branch `main`
STAGE_OUTPUTS = ("student", "teacher")
NAME_CHARS = 30  # the clients take at most 96 characters for tenant, job's name and id together
JOB_REPO = re.compile(r".*-([0-9a-f]{32})")
PIPELINES = {
    "text_classification": "text-classification",
    "multi_label_classification": "text-classification",
    "text_regression": "text-classification",
    "token_classification": "token-classification",
    "causal_lm": "text-generation",
}
HEADS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
}


class Revision(NamedTuple):
    """The files of one commit."""

    commit: str
    files: list[ManifestFile]


class Repo(NamedTuple):
    """A repository: what its branches hold now.

    Attributes:
        id: `tenant/name`.
        pipeline: What its models do, as the Hub calls it.
    """

    id: str
    created_at: datetime
    changed_at: datetime
    branches: dict[str, Revision]
    pipeline: str | None = None

    def get_revision(self, name: str) -> Revision:
        """Returns the files of a branch or commit. Raises RevisionNotFound."""
        by_commit = {revision.commit: revision for revision in self.branches.values()}
        found = self.branches.get(name.replace("_", "-")) or by_commit.get(name)
        if found is None:
            there = ", ".join(self.branches) or "none yet"
            raise RevisionNotFound(f"'{self.id}' has no revision '{name}'; its branches: {there}.")
        return found


def repo_name(job: Job) -> str:
    """Returns the name of a job's repository: what the job is called, made fit for the clients, and its id."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", job.name)[:NAME_CHARS].strip("-") or "job"
    return f"{name}-{job.id.removeprefix('job_')}"


def get_repo(session: Session, principal: Principal, kind: str, owner: str, name: str) -> Repo:
    """Returns a repository of the tenant. Raises RepoNotFound."""
    found = None
    if owner == principal.tenant_name:
        found = _find_repo(session, principal.tenant_id, kind, name)
    if found is None:
        raise RepoNotFound(f"There is no repository '{owner}/{name}' among the {kind} of your tenant.")
    return found._replace(id=f"{owner}/{name}")


def _find_repo(session: Session, tenant_id: str, kind: str, name: str) -> Repo | None:
    if kind == DATASETS:
        dataset = find_dataset(session, tenant_id, name)
        return _dataset_repo(dataset) if dataset is not None and dataset.name == name else None
    if kind != MODELS:
        return None
    model = find_model(session, tenant_id, name)
    if model is not None and model.name == name:
        branches = {MAIN: _revision(files_of(get_manifest(session, tenant_id, model.manifest_id)))}
        ends = (HEADS[end] for name in model.facts["architectures"] for end in HEADS if name.endswith(end))
        return Repo("", model.created_at, model.created_at, branches, next(ends, None))
    job = _find_job(session, tenant_id, name)
    return _job_repo(session, job) if job is not None else None


def _find_job(session: Session, tenant_id: str, name: str) -> Job | None:
    match = JOB_REPO.fullmatch(name)
    try:
        job = get_job(session, tenant_id, f"job_{match.group(1)}") if match else None
    except (NotFound, Gone):
        return None
    return job if job is not None and repo_name(job) == name else None


def _dataset_repo(dataset: Dataset) -> Repo:
    files = [
        ManifestFile(path=f"{split}.jsonl", sha256=stored["sha256"], size_bytes=stored["size_bytes"])
        for split, stored in dataset.splits.items()
    ]
    return Repo("", dataset.created_at, dataset.created_at, {MAIN: _revision(files)})


def _job_repo(session: Session, job: Job) -> Repo:
    """`main` is what a job that has succeeded made to be deployed; each artifact and stage has a branch of its own."""
    artifacts = list_artifacts(session, job.tenant_id, job.id)
    branches = {artifact.name.replace("_", "-"): artifact.manifest_id for artifact in artifacts}
    best = next((branches[name] for name in MAIN_ARTIFACTS if name in branches), None)
    if best is not None and job.state == "succeeded":
        branches = {MAIN: best} | branches
    for stage in list_stages(session, job.tenant_id, job.id) if job.state != "cancelled" else ():
        made = next((stage.outputs[role] for role in STAGE_OUTPUTS if role in stage.outputs), None)
        if made is not None and stage.state in {"succeeded", "cached"}:
            branches[f"stage-{stage.kind.replace('_', '-')}"] = made
    manifests = list_manifests(session, job.tenant_id, branches.values())
    found = {name: _revision(files_of(manifests[manifest_id])) for name, manifest_id in branches.items()}
    changed_at = job.finished_at or job.started_at or job.created_at
    return Repo("", job.created_at, changed_at, found, PIPELINES.get(job.spec["task"]["kind"]))


def _revision(files: list[ManifestFile]) -> Revision:
    return Revision(commit_oid(files), files)
