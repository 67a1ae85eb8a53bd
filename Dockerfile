# syntax=docker/dockerfile:1
# Two targets: `api` (no torch) and `worker`.
FROM python:3.11-slim AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN groupadd --gid 10001 stillhouse \
    && useradd --uid 10001 --gid stillhouse --home-dir /data --shell /usr/sbin/nologin stillhouse \
    && mkdir -p /data/blobs /data/staging && chown -R stillhouse:stillhouse /data
WORKDIR /srv/stillhouse
COPY pyproject.toml constraints.txt README.md ./
COPY core core
COPY migrations migrations
COPY stillhouse stillhouse
COPY worker/__init__.py worker/__init__.py
COPY worker/methods worker/methods
ENV STILLHOUSE_STORAGE_DIR=/data/blobs STILLHOUSE_STAGING_DIR=/data/staging

FROM base AS api
COPY app app
RUN pip install --constraint constraints.txt '.[api]'
USER stillhouse
EXPOSE 8500
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8500/healthz', timeout=2)"]
CMD ["uvicorn", "app.main:app", "--host", "0.0.0.0", "--port", "8500", "--timeout-keep-alive", "75", "--timeout-graceful-shutdown", "5"]

FROM base AS worker
# Build with --build-arg TORCH_INDEX_ARGS="--extra-index-url …" to choose another build of torch, such as one without CUDA.
ARG TORCH_INDEX_ARGS=""
# Build with --build-arg EXTRAS=worker,openvino,executorch,compressed_tensors for the forms that need libraries of their own.
ARG EXTRAS=worker
COPY worker worker
RUN pip install --constraint constraints.txt ${TORCH_INDEX_ARGS} torch==2.13.0 \
    && pip install --constraint constraints.txt ".[${EXTRAS}]"
USER stillhouse
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s \
    CMD ["python", "-c", "from core.db import get_engine; get_engine().connect().close()"]
# The worker stops its stage and hands its job back within this time; keep the grace time of your platform above it.
STOPSIGNAL SIGTERM
CMD ["celery", "-A", "worker.celery_app:app", "worker", "--pool", "threads", "--concurrency", "1", "--queues", "cpu", \
    "--without-mingle", "--without-gossip", "--loglevel", "INFO"]
