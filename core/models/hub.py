"""Models of a Hugging Face hub: what a reference means now, and the bytes of one commit."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from core.errors import ModelInvalid, PayloadTooLarge, Unavailable
from core.models.checking import WEIGHTS, check_model, find_code_key, is_allowed_name, raise_details, sniff
from core.models.facts import ModelFacts, read_facts
from core.settings import get_settings
from core.storage import ArtifactStore, BlobWriter, ManifestFile, is_safe_path

TIMEOUT_S = 20
MAX_FILES = 1_000


class HubModel(NamedTuple):
    """A hub model as of one commit."""

    repo: str
    commit: str
    facts: ModelFacts


def resolve(ref: str) -> HubModel:
    """Returns what `org/name[@revision]` (with or without `hub:`) means now, reading only its config.json.

    Raises ModelInvalid when there is no such model or it cannot be used, Unavailable when the hub does not answer.
    """
    repo, _, revision = ref.removeprefix("hub:").partition("@")
    with _hub_errors(ref):
        info = _api().model_info(repo, revision=revision or "main", timeout=TIMEOUT_S, files_metadata=True)
    names = {sibling.rfilename for sibling in info.siblings or []}
    if not any(name.endswith(".safetensors") for name in names):
        raise_details(
            [{"file": WEIGHTS, "message": f"'{repo}' has no safetensors weights, and no other form is accepted"}]
        )
    if "config.json" not in names:
        raise_details([{"file": "config.json", "message": f"'{repo}' has no config.json"}])
    total = info.safetensors.total if info.safetensors else None
    return HubModel(repo, str(info.sha), _read_config(repo, str(info.sha), total))


def fetch(repo: str, commit: str, store: ArtifactStore, between: Callable[[], None]) -> list[ManifestFile]:
    """Returns the stored files of a commit, checked as an upload is. Raises ModelInvalid or Unavailable.

    `between` is called with every MiB, and may raise to stop.
    """
    with _hub_errors(repo), ExitStack() as stack:
        info = _api().model_info(repo, revision=commit, timeout=TIMEOUT_S, files_metadata=True)
        siblings = [s for s in info.siblings or [] if is_safe_path(s.rfilename) and is_allowed_name(s.rfilename)]
        if len(siblings) > MAX_FILES or sum(s.size or 0 for s in siblings) > get_settings().max_upload_bytes:
            raise PayloadTooLarge(f"'{repo}' is larger than this server accepts.")
        staged: dict[str, BlobWriter] = {}
        for sibling in siblings:
            staged[sibling.rfilename] = writer = stack.enter_context(store.writer())
            _download(repo, commit, sibling.rfilename, writer, between=between)
        for writer in staged.values():
            writer.seal()
        check_model({path: writer.path for path, writer in staged.items()})
        blobs = {path: writer.commit() for path, writer in staged.items()}
    return [
        ManifestFile(path=path, sha256=blob.sha256, size_bytes=blob.size_bytes) for path, blob in sorted(blobs.items())
    ]


def _read_config(repo: str, commit: str, num_parameters: int | None) -> ModelFacts:
    with tempfile.TemporaryDirectory() as folder, _hub_errors(repo):
        store = ArtifactStore(Path(folder))
        with store.writer() as writer:
            _download(repo, commit, "config.json", writer, limit_bytes=10_000_000)
            writer.seal()
            problem = sniff(writer.path)
            raw = writer.path.read_bytes()
    try:
        config: Any = json.loads(raw)
        key = find_code_key(config)
        if key:
            raise ValueError(f"'{key}' would run code from the model's folder, which is never done")
        return read_facts(config, num_parameters)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ModelInvalid(f"'{repo}': config.json cannot be used: {problem or error}", param="config.json") from error


def _download(
    repo: str,
    commit: str,
    path: str,
    writer: BlobWriter,
    limit_bytes: int | None = None,
    between: Callable[[], None] = lambda: None,
) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    settings = get_settings()
    limit = limit_bytes or settings.max_upload_bytes
    url = hf_hub_url(repo, path, revision=commit, endpoint=settings.hub_endpoint)
    headers = build_hf_headers(token=settings.hub_token or False)
    with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT_S) as response:
        hf_raise_for_status(response)
        for chunk in response.iter_bytes(1024 * 1024):
            between()
            writer.write(chunk)
            if writer.size_bytes > limit:
                raise PayloadTooLarge(f"'{path}' of '{repo}' is larger than this server accepts.")


def _api() -> Any:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi  # half a second that most processes never need

    settings = get_settings()
    return HfApi(endpoint=settings.hub_endpoint, token=settings.hub_token or False)


@contextmanager
def _hub_errors(ref: str) -> Iterator[None]:
    from huggingface_hub import errors

    gone = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError)
    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelInvalid(f"'{ref}' is gated on the hub; the server's hub token does not open it.") from error
    except (*gone, errors.HFValidationError) as error:
        raise ModelInvalid(f"The hub has no model '{ref}'; check organisation, name and revision.") from error
    except (errors.HTTPError, ConnectionError) as error:  # HTTPError of whichever client the library brings
        raise Unavailable(f"The hub at {get_settings().hub_endpoint} does not answer; try again later.") from error
