"""What a job's repository is called."""

import re

from core.jobs.models import Job

NAME_CHARS = 30  # the Hub's clients take at most 96 characters for tenant, job's name and id together


def repo_name(job: Job) -> str:
    """Returns the name of a job's repository: what the job is called, made fit for the Hub's clients, and its id."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", job.name)[:NAME_CHARS].strip("-") or "job"
    return f"{name}-{job.id.removeprefix('job_')}"
