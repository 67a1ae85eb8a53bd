"""What API tests need: small uploads made by hand, and jobs brought to an end without a worker."""

import json
import struct
from dataclasses import dataclass, field
from typing import Any

import httpx

LABELS = ("refund", "delivery", "login")


def safetensors(tensors: dict[str, tuple[int, ...]]) -> bytes:
    """Returns a file of zeros in F32, written without the library that reads it elsewhere."""
    header: dict[str, Any] = {}
    position = 0
    for name, shape in tensors.items():
        size = 4
        for side in shape:
            size *= side
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(position)


def model_files(num_layers: int = 6, **config: Any) -> dict[str, bytes]:
    """Returns the files of a model folder by path."""
    settings = {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "num_hidden_layers": num_layers,
        "hidden_size": 4,
        "vocab_size": 10,
    }
    return {
        "config.json": json.dumps(settings | config).encode(),
        "tokenizer.json": b'{"version": "1.0", "model": {"type": "WordPiece", "vocab": {"[UNK]": 0}}}',
        "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
        "README.md": "# A model, über alles geprüft\n".encode(),
        "model.safetensors": safetensors({"embeddings": (10, 4), "pooler": (4, 4), "bias": (4,)}),
    }


def rows(count: int = 12, labels: tuple[str, ...] = LABELS, start: int = 0) -> list[dict[str, Any]]:
    """Returns rows of a small data set."""
    return [{"text": f"ticket number {start + n}", "label": labels[n % len(labels)]} for n in range(count)]


def jsonl(found: list[Any]) -> bytes:
    """Returns rows as JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found).encode()


SPLITS = {"train": jsonl(rows(30)), "validation": jsonl(rows(6, start=100)), "test": jsonl(rows(9, start=200))}


@dataclass
class Api:
    """The app, asked as one tenant."""

    client: httpx.Client
    tenant_id: str
    key: str
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.headers = {"Authorization": f"Bearer {self.key}"} | self.headers

    def __call__(self, method: str, path: str, headers: dict[str, str] | None = None, **options: Any) -> Any:
        return self.client.request(method, path, headers=self.headers | (headers or {}), **options)

    def push_dataset(self, name: str = "tickets", splits: dict[str, bytes] | None = None, **fields: str) -> Any:
        files = [(split, (f"{split}.jsonl", data)) for split, data in (splits or SPLITS).items()]
        return self("POST", "/v1/datasets", data={"name": name, **fields}, files=files)

    def push_model(self, name: str = "minilm", files: dict[str, bytes] | None = None) -> Any:
        parts = [("files", (path, data)) for path, data in (model_files() if files is None else files).items()]
        return self("POST", "/v1/models", data={"name": name}, files=parts)

    def spec(self, **changes: Any) -> dict[str, Any]:
        base = {
            "teacher": {"model": "minilm"},
            "student": {"kind": "teacher_layers", "keep": [0, 2]},
            "data": "tickets",
        }
        return base | changes

    def make_job(self, **changes: Any) -> str:
        """Returns the id of a new job, its data set and model pushed before if need be."""
        if self("GET", "/v1/datasets/tickets").status_code == 404:
            assert self.push_dataset().status_code == 201
            assert self.push_model().status_code == 201
        answer = self("POST", "/v1/jobs", json=self.spec(**changes))
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])


def claim_job(job_id: str) -> Any:
    """Returns a claim on this very job: it is moved to a queue of its own first."""
    from core.db import session_scope
    from core.jobs.models import Job
    from core.jobs.ownership import claim

    with session_scope() as session:
        session.get_one(Job, job_id).queue = job_id
    with session_scope() as session:
        claimed = claim(session, "test-worker", [job_id])
    assert claimed is not None
    return claimed


def run_job(job_id: str, outputs: dict[str, dict[str, bytes]] | None = None) -> None:
    """Brings a job to its end as a worker would: metrics, a log and outputs in its first stage."""
    from core.db import session_scope
    from core.jobs.models import StageRun
    from core.jobs.ownership import Point, commit_stage, record_progress, start_stage
    from core.storage import ManifestFile, get_store

    claimed = claim_job(job_id)
    store = get_store()
    log = store.put_bytes(b"a line of the log\n")
    made = {
        name: [
            ManifestFile(path=path, sha256=blob.sha256, size_bytes=blob.size_bytes)
            for path, blob in ((path, store.put_bytes(data)) for path, data in files.items())
        ]
        for name, files in (outputs or {"student": model_files(2)}).items()
    }
    with session_scope() as session:
        count = session.query(StageRun).filter_by(job_id=job_id).count()
    for ordinal in range(count):
        with session_scope() as session:
            start_stage(session, claimed, ordinal)
        points = [Point("loss", step, 1.0 / (step + 1)) for step in range(1000)] if ordinal == 0 else []
        with session_scope() as session:
            record_progress(session, claimed, ordinal, {"step": 5, "total": 10, "eta_s": 2.0}, points, [])
        with session_scope() as session:
            commit_stage(session, claimed, ordinal, made if ordinal == 0 else {}, {"accuracy": 0.9}, log)


def num_blobs() -> int:
    """Returns how many files the store holds, half-written ones included."""
    from core.storage import get_store

    return sum(1 for path in get_store().root.rglob("*") if path.is_file())
