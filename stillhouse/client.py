"""The Python client: `from stillhouse import Client`, or `AsyncClient` for asyncio."""

from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from stillhouse.connection import resolve
from stillhouse.forms import Async, F, Sync, call, iterate
from stillhouse.jobs import Jobs
from stillhouse.results import Dataset, Key, Method, Model, Preview, Secret
from stillhouse.transport import Group, Transport
from stillhouse.uploads import model_files, open_parts
from stillhouse.webhooks import Webhooks

UPLOAD_TIMEOUT_S = 3600.0


class Nouns(Group[F]):
    """What both clients offer."""

    def __init__(self, transport: Transport[F]) -> None:
        super().__init__(transport)
        self.models = Models(transport)
        self.datasets = Datasets(transport)
        self.jobs = Jobs(transport)
        self.keys = Keys(transport)
        self.secrets = Secrets(transport)
        self.webhooks = Webhooks(transport)

    @property
    def url(self) -> str:
        """The server's address."""
        return self._transport.url

    @call
    async def methods(self) -> dict[str, list[Method]]:
        """Returns every method that the server knows, by family, with its JSON schema, defaults and description."""
        families = await self._transport.data("/v1/methods")
        return {family: [Method.model_validate(item) for item in methods] for family, methods in families.items()}

    @call
    async def close(self) -> None:
        """Closes the connections."""
        await self._form.close()


class Client(Nouns[Sync]):
    """A Stillhouse server, seen with one API key.

    Without arguments it uses STILLHOUSE_URL and STILLHOUSE_API_KEY, or else the local stack that runs on this machine.

        with Client() as client:
            client.models.push("./minilm", "minilm-l6")
            client.datasets.push("tickets", {"train": "train.jsonl", "test": "test.jsonl"})
            job = client.jobs.submit("job.yaml").wait()
            job.download("onnx_int8", "out")
    """

    def __init__(self, url: str | None = None, api_key: str | None = None, *, retries: int = 4) -> None:
        super().__init__(Transport(Sync, *resolve(url, api_key), retries))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient(Nouns[Async]):
    """The same for asyncio, on one event loop: what `Client` returns is awaited here, and iterated with `async for`.

        async with AsyncClient() as client:
            jobs = [await client.jobs.submit(f"job-{seed}.yaml") for seed in range(20)]
            for job in await asyncio.gather(*(job.wait() for job in jobs)):
                await job.download("onnx_int8", f"out/{job.id}")

    Functions that are handed in, as `on_progress`, are plain ones here, too.
    """

    def __init__(self, url: str | None = None, api_key: str | None = None, *, retries: int = 4) -> None:
        super().__init__(Transport(Async, *resolve(url, api_key), retries))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class Models(Group[F]):
    """The models of your tenant."""

    @call
    async def push(self, folder: str | Path, name: str, *, files: Mapping[str, str | Path] | None = None) -> Model:
        """Returns the model made of a folder's files, or of `files` (relative path to file on disk) alone."""
        chosen = {path: Path(file) for path, file in files.items()} if files else model_files(Path(folder))
        with open_parts([("files", path, file) for path, file in chosen.items()]) as parts:
            return await self._transport.result(
                Model, "POST", "/v1/models", data={"name": name}, files=parts, timeout=UPLOAD_TIMEOUT_S
            )

    @call
    async def get(self, model_id: str) -> Model:
        """Returns a model by its id or name."""
        return await self._transport.result(Model, "GET", f"/v1/models/{_ref(model_id)}")

    @iterate
    def list(self, *, limit: int | None = None) -> AsyncIterator[Model]:
        """Yields the models, newest first, fetching page after page."""
        return self._transport.pages(Model, "/v1/models", limit=limit)

    @call
    async def delete(self, model_id: str) -> None:
        """Deletes a model."""
        await self._transport.request("DELETE", f"/v1/models/{_ref(model_id)}")


class Datasets(Group[F]):
    """The data sets of your tenant."""

    @call
    async def push(
        self, name: str, splits: Mapping[str, str | Path], *, text: str | None = None, label: str | None = None
    ) -> Dataset:
        """Returns the data set made of one JSON Lines, CSV or Parquet file per split.

        `text` and `label` name the columns, if they are not called so.
        """
        fields = {"name": name} | {key: value for key, value in (("text", text), ("label", label)) if value}
        files = [(split, Path(path).name, Path(path)) for split, path in splits.items()]
        with open_parts(files) as parts:
            return await self._transport.result(
                Dataset, "POST", "/v1/datasets", data=fields, files=parts, timeout=UPLOAD_TIMEOUT_S
            )

    @call
    async def get(self, dataset_id: str) -> Dataset:
        """Returns a data set by its id or name."""
        return await self._transport.result(Dataset, "GET", f"/v1/datasets/{_ref(dataset_id)}")

    @iterate
    def list(self, *, limit: int | None = None) -> AsyncIterator[Dataset]:
        """Yields the data sets, newest first, fetching page after page."""
        return self._transport.pages(Dataset, "/v1/datasets", limit=limit)

    @call
    async def preview(self, dataset_id: str, split: str = "train", *, limit: int = 10, offset: int = 0) -> Preview:
        """Returns some rows of a split."""
        query: dict[str, Any] = {"split": split, "limit": limit, "offset": offset}
        return await self._transport.result(Preview, "GET", f"/v1/datasets/{_ref(dataset_id)}/preview", params=query)

    @call
    async def delete(self, dataset_id: str) -> None:
        """Deletes a data set."""
        await self._transport.request("DELETE", f"/v1/datasets/{_ref(dataset_id)}")


class Keys(Group[F]):
    """The API keys of your tenant; your own key needs the scope `keys`."""

    @call
    async def create(self, name: str, scopes: list[str], expires_at: datetime | None = None) -> Key:
        """Returns a new key; its text is in `key`, and is never shown again. `expires_at` needs a time zone."""
        body = {"name": name, "scopes": scopes, "expires_at": expires_at.isoformat() if expires_at else None}
        return await self._transport.result(Key, "POST", "/v1/keys", json=body)

    @iterate
    def list(self) -> AsyncIterator[Key]:
        """Yields the keys, newest first, without their texts."""
        return self._transport.page(Key, "/v1/keys")

    @call
    async def revoke(self, key_id: str) -> None:
        """Revokes a key: from now on it opens nothing."""
        await self._transport.request("DELETE", f"/v1/keys/{_ref(key_id)}")


class Secrets(Group[F]):
    """Keys of other services that your jobs use, such as that of a teacher's API; their values are never shown."""

    @call
    async def put(self, name: str, value: str) -> Secret:
        """Stores a secret, in place of an earlier one of that name."""
        return await self._transport.result(Secret, "PUT", f"/v1/secrets/{_ref(name)}", json={"value": value})

    @iterate
    def list(self) -> AsyncIterator[Secret]:
        """Yields the secrets by name, without their values."""
        return self._transport.page(Secret, "/v1/secrets")

    @call
    async def delete(self, name: str) -> None:
        """Deletes a secret."""
        await self._transport.request("DELETE", f"/v1/secrets/{_ref(name)}")


def _ref(name: str) -> str:
    """Returns an id, `name` or `tenant/name` as a part of an address."""
    return quote(name, safe="/")
