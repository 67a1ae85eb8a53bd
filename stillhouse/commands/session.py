"""The client that a command uses, and the objects that its arguments name."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from stillhouse.client import Client
from stillhouse.errors import InvalidInput
from stillhouse.results import Job

JOB_ID = re.compile(r"^job_[0-9a-f]{32}$")


@contextmanager
def connect() -> Iterator[Client]:
    """Yields a client for the server that the environment names, or for the local stack."""
    with Client() as client:
        yield client


def find_job(client: Client, reference: str) -> Job:
    """Returns a job by its id, or the newest job of that name."""
    if JOB_ID.match(reference):
        return client.jobs.get(reference)
    newest = next((job for job in client.jobs.list(name=reference, limit=20) if job.name == reference), None)
    if newest is None:
        raise UnknownJob(f"There is no job with the id or name '{reference}'. `stillhouse jobs list` shows yours.")
    return client.jobs.get(newest.id)


def parse_pairs(pairs: list[str], example: str) -> dict[str, str]:
    """Returns `name=value` arguments as a dictionary. Raises InvalidInput."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name or not value:
            raise InvalidInput(f"'{pair}' is not of the form name=value, such as {example}.")
        found[name] = value
    return found


class UnknownJob(InvalidInput):
    """No job has that id or name."""

    exit_code = 3
