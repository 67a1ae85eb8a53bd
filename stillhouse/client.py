"""The Python client: `from stillhouse import Client`."""

from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from stillhouse.connection import resolve
from stillhouse.jobs import Jobs
from stillhouse.results import Dataset, Key, Method, Model, Preview, Secret
from stillhouse.transport import Transport
from stillhouse.uploads import model_files, open_parts
from stillhouse.webhooks import Webhooks

UPLOAD_TIMEOUT_S = 3600.0


class Client:
    """A Stillhouse server, seen with one API key.

    Without arguments it uses STILLHOUSE_URL and STILLHOUSE_API_KEY, or else the local stack that runs on this machine.

        with Client() as client:
            client.models.push("./minilm", "minilm-l6")
            client.datasets.push("tickets", {"train": "train.jsonl", "test": "test.jsonl"})
            job = client.jobs.wait(client.jobs.submit("job.yaml").id)
            client.jobs.download(job.id, "onnx_int8", "out")
    """

    def __init__(self, url: str | None = None, api_key: str | None = None, *, retries: int = 4) -> None:
        url, api_key = resolve(url, api_key)
        self._transport = Transport(url, api_key, retries)
        self.models = Models(self._transport)
        self.datasets = Datasets(self._transport)
        self.jobs = Jobs(self._transport)
        self.keys = Keys(self._transport)
        self.secrets = Secrets(self._transport)
        self.webhooks = Webhooks(self._transport)

    @property
    def url(self) -> str:
        """The server's address."""
        return self._transport.url

    def methods(self) -> dict[str, list[Method]]:
        """Returns every method that the server knows, by family, with its JSON schema, defaults and description."""
        families = self._transport.data("/v1/methods")
        return {family: [Method.model_validate(item) for item in methods] for family, methods in families.items()}

    def close(self) -> None:
        """Closes the connections."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Models:
    """The models of your tenant."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def push(self, folder: str | Path, name: str, *, files: Mapping[str, str | Path] | None = None) -> Model:
        """Returns the model made of a folder's files, or of `files` (relative path to file on disk) alone."""
        chosen = {path: Path(file) for path, file in files.items()} if files else model_files(Path(folder))
        with open_parts([("files", path, file) for path, file in chosen.items()]) as parts:
            made = self._transport.json(
                "POST", "/v1/models", data={"name": name}, files=parts, timeout=UPLOAD_TIMEOUT_S
            )
        return Model.model_validate(made)

    def get(self, model_id: str) -> Model:
        """Returns a model by its id or name."""
        return Model.model_validate(self._transport.json("GET", f"/v1/models/{_ref(model_id)}"))

    def list(self, *, limit: int | None = None) -> Iterator[Model]:
        """Yields the models, newest first, fetching page after page."""
        return map(Model.model_validate, self._transport.pages("/v1/models", limit=limit))

    def delete(self, model_id: str) -> None:
        """Deletes a model."""
        self._transport.request("DELETE", f"/v1/models/{_ref(model_id)}")


class Datasets:
    """The data sets of your tenant."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def push(
        self, name: str, splits: Mapping[str, str | Path], *, text: str | None = None, label: str | None = None
    ) -> Dataset:
        """Returns the data set made of one JSON Lines, CSV or Parquet file per split.

        `text` and `label` name the columns, if they are not called so.
        """
        fields = {"name": name} | {key: value for key, value in (("text", text), ("label", label)) if value}
        files = [(split, Path(path).name, Path(path)) for split, path in splits.items()]
        with open_parts(files) as parts:
            made = self._transport.json("POST", "/v1/datasets", data=fields, files=parts, timeout=UPLOAD_TIMEOUT_S)
        return Dataset.model_validate(made)

    def get(self, dataset_id: str) -> Dataset:
        """Returns a data set by its id or name."""
        return Dataset.model_validate(self._transport.json("GET", f"/v1/datasets/{_ref(dataset_id)}"))

    def list(self, *, limit: int | None = None) -> Iterator[Dataset]:
        """Yields the data sets, newest first, fetching page after page."""
        return map(Dataset.model_validate, self._transport.pages("/v1/datasets", limit=limit))

    def preview(self, dataset_id: str, split: str = "train", *, limit: int = 10, offset: int = 0) -> Preview:
        """Returns some rows of a split."""
        query: dict[str, Any] = {"split": split, "limit": limit, "offset": offset}
        found = self._transport.json("GET", f"/v1/datasets/{_ref(dataset_id)}/preview", params=query)
        return Preview.model_validate(found)

    def delete(self, dataset_id: str) -> None:
        """Deletes a data set."""
        self._transport.request("DELETE", f"/v1/datasets/{_ref(dataset_id)}")


class Keys:
    """The API keys of your tenant; your own key needs the scope `keys`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(self, name: str, scopes: list[str], expires_at: datetime | None = None) -> Key:
        """Returns a new key; its text is in `key`, and is never shown again. `expires_at` needs a time zone."""
        body = {"name": name, "scopes": scopes, "expires_at": expires_at.isoformat() if expires_at else None}
        return Key.model_validate(self._transport.json("POST", "/v1/keys", json=body))

    def list(self) -> Iterator[Key]:
        """Yields the keys, newest first, without their texts."""
        return map(Key.model_validate, self._transport.data("/v1/keys"))

    def revoke(self, key_id: str) -> None:
        """Revokes a key: from now on it opens nothing."""
        self._transport.request("DELETE", f"/v1/keys/{_ref(key_id)}")


class Secrets:
    """Keys of other services that your jobs use, such as that of a teacher's API; their values are never shown."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def put(self, name: str, value: str) -> Secret:
        """Stores a secret, in place of an earlier one of that name."""
        return Secret.model_validate(self._transport.json("PUT", f"/v1/secrets/{_ref(name)}", json={"value": value}))

    def list(self) -> Iterator[Secret]:
        """Yields the secrets by name, without their values."""
        return map(Secret.model_validate, self._transport.data("/v1/secrets"))

    def delete(self, name: str) -> None:
        """Deletes a secret."""
        self._transport.request("DELETE", f"/v1/secrets/{_ref(name)}")


def _ref(name: str) -> str:
    """Returns an id, `name` or `tenant/name` as a part of an address."""
    return quote(name, safe="/")
