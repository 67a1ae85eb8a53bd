"""What Prometheus asks of the tables: jobs by state, queue depth, seconds of stages."""

from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import extract, func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from core.db import session_scope
from core.jobs.models import Job, StageRun
from core.jobs.state import JOB_STATES
from core.queue import QUEUES


class JobsCollector(Collector):
    """Reads the tables at every scrape, so that any number of API processes tells the same."""

    def describe(self) -> Iterable[Metric]:
        """Returns nothing: the names need no check against the database at registration."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Yields the current values, or only that the database is down."""
        up = GaugeMetricFamily("stillhouse_database_up", "Whether the database answers.")
        try:
            with session_scope() as session:
                families = [_jobs(session), _queues(session), _stage_seconds(session)]
        except SQLAlchemyError:
            families = []
        up.add_metric([], float(bool(families)))
        return [up, *families]


def _jobs(session: Session) -> Metric:
    family = GaugeMetricFamily("stillhouse_jobs", "Jobs by state, without deleted ones.", labels=["state"])
    query = select(Job.state, func.count()).where(Job.deleted_at.is_(None)).group_by(Job.state)
    counts = dict(session.execute(query).tuples().all())
    for state in JOB_STATES:
        family.add_metric([state], counts.get(state, 0))
    return family


def _queues(session: Session) -> Metric:
    family = GaugeMetricFamily("stillhouse_queue_depth", "Jobs that wait for a worker.", labels=["queue"])
    query = select(Job.queue, func.count()).where(Job.state == "queued", Job.deleted_at.is_(None)).group_by(Job.queue)
    counts = dict(session.execute(query).tuples().all())
    for queue in QUEUES:
        family.add_metric([queue], counts.get(queue, 0))
    return family


def _stage_seconds(session: Session) -> Metric:
    family = SummaryMetricFamily("stillhouse_stage_seconds", "Run time of finished stages.", labels=["kind", "state"])
    seconds = func.coalesce(func.sum(extract("epoch", StageRun.finished_at - StageRun.started_at)), 0)
    query = (
        select(StageRun.kind, StageRun.state, func.count(), seconds)
        .where(StageRun.started_at.is_not(None), StageRun.finished_at.is_not(None))
        .group_by(StageRun.kind, StageRun.state)
    )
    for kind, state, count, total in session.execute(query):
        family.add_metric([kind, state], count, float(total))
    return family
