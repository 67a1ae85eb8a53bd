"""What layers of a teacher compute, kept by the stage `answer` for losses on them, and read without the teacher.

`layers-00000.safetensors` and so on (`worker/engine/shards.py`) hold `<part>.<layer>`: for `first_token` a row for each
text of the training split, else one for each of its tokens, in float16. A text is found by the tokens that are read of
it, so it does not matter how a batch is put together, nor which rows the task counts. The metadata hold, as JSON under
`about`, a digest of all these tokens, the sizes of the teacher, and how many heads share one of keys and values.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from core.errors import StageFailed
from core.losses import LayerPart
from worker.engine.blocks import Blocks
from worker.engine.data import Encoded, mask_of
from worker.engine.features import Layer, Sizes, Wanted, make_layer
from worker.engine.loading import INPUT_NAMES
from worker.engine.shards import Shards, shard_path
from worker.engine.watching import Watched

if TYPE_CHECKING:
    from worker.engine.context import StageContext

LAYERS = "layers"  # of the names of shards
KEY_BYTES = 16
NOWHERE = -1
Inputs = Mapping[str, Tensor]


def read_keys(inputs: Inputs) -> list[bytes]:
    """Returns what only a text with the same tokens has, for each text of a batch, whatever its padding.

    Types of its tokens count where one is not 0: without them a model takes all for 0.
    """
    lengths_B = mask_of(inputs).sum(dim=1).tolist()
    ids_BT = inputs["input_ids"].cpu().numpy()
    types_BT = inputs["token_type_ids"].cpu().numpy() if "token_type_ids" in inputs else np.zeros_like(ids_BT)
    rows = [(ids_BT[row, :length], types_BT[row, :length]) for row, length in enumerate(lengths_B)]
    texts = (ids_T.tobytes() + (types_T.tobytes() if types_T.any() else b"") for ids_T, types_T in rows)
    return [hashlib.blake2b(text, digest_size=KEY_BYTES).digest() for text in texts]


class Places:
    """Where the texts of a split stand in a row of all of its tokens.

    Attributes:
        digest: What only a split with the same tokens has.
        starts: Of each text its first token, and at the end the number of all tokens.
        is_found: Which texts can be found: of several with the same tokens the first.
    """

    def __init__(self, data: Encoded | Blocks) -> None:
        keys, lengths = [], []
        for row in range(len(data)):
            inputs = data.single(row)
            keys += read_keys(inputs)
            lengths.append(inputs["input_ids"].shape[1])
        self.digest = hashlib.sha256(b"".join(keys)).hexdigest()
        self.starts: NDArray[np.int64] = np.concatenate([[0], np.cumsum(lengths)])
        self._text_of: dict[bytes, int] = {}
        for text, key in enumerate(keys):
            self._text_of.setdefault(key, text)
        self.is_found = torch.zeros(len(keys), dtype=torch.bool)
        self.is_found[[*self._text_of.values()]] = True

    def find(self, inputs: Inputs) -> Tensor:
        """Returns the number of each text of a batch, texts_B, and NOWHERE for one that is not in the split."""
        return torch.tensor([self._text_of.get(key, NOWHERE) for key in read_keys(inputs)])

    def tokens(self, texts_B: Tensor) -> Tensor:
        """Returns the numbers of all tokens of some texts, text by text, as a mask of their batch picks them."""
        spans = [torch.arange(self.starts[text], self.starts[text + 1]) for text in texts_B.tolist()]
        return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)


class Recorder:
    """Keeps what layers of a model compute, whenever it reads one of some texts of a split.

    Attributes:
        tensors: What is kept, in files that are mapped into memory, so that it need not fit there.
        keeps: The texts whose layers it is to keep, among those for which it has begun.
        text_bytes: What the longest text takes.
    """

    def __init__(self, ctx: "StageContext", model: PreTrainedModel, data: Encoded | Blocks, layers: Wanted) -> None:
        self._watched, self._places, base = Watched(model), Places(data), model.base_model
        wanted = {part: _count_from_0(part, found, self._watched.sizes.num_layers) for part, found in layers.items()}
        self._watched.ask(wanted)
        self._names = {f"{part}.{index}": (part, index) for part, found in wanted.items() for index in found}
        with torch.no_grad():  # one text shows how wide everything is
            base(**{name: ids.to(model.device) for name, ids in data.single(0).items()})
        self._widths = {name: self._watched.parts(index)[part].shape[-1] for name, (part, index) in self._names.items()}
        longest, self._scratch_dir = int(np.diff(self._places.starts).max()), ctx.scratch_dir
        rows = {name: 1 if part == "first_token" else longest for name, (part, _) in self._names.items()}
        self.text_bytes = torch.float16.itemsize * sum(rows[name] * width for name, width in self._widths.items())
        self.tensors: dict[str, Tensor] = {}
        self.keeps = range(0)
        self._signature = inspect.signature(base.forward)
        base.register_forward_hook(self._keep, with_kwargs=True)

    def begin(self, start: int, end: int) -> None:
        """Makes room for some texts and keeps these, in place of those before."""
        self.keeps, self._first = range(start, end), start
        self._is_kept, self.tensors = torch.zeros(end - start, dtype=torch.uint8), {}
        num_tokens = int(self._places.starts[end] - self._places.starts[start])
        for name, (part, _) in self._names.items():
            shape = end - start if part == "first_token" else num_tokens, self._widths[name]
            self.tensors[name] = _map(self._scratch_dir / f"{name}.bin", *shape)

    def _keep(self, _: Module, given: tuple[Any, ...], named: dict[str, Any], __: Any) -> None:
        if not self.keeps:
            return
        bound = self._signature.bind(*given, **named).arguments
        inputs = {name: bound[name] for name in INPUT_NAMES if isinstance(bound.get(name), Tensor)}
        texts_B = self._places.find(inputs)
        is_known_B = (texts_B >= self.keeps.start) & (texts_B < self.keeps.stop)
        texts_B, mask_BT = texts_B[is_known_B], mask_of(inputs).cpu() & is_known_B[:, None]
        tokens_N = self._places.tokens(texts_B) - int(self._places.starts[self._first])
        texts_B -= self._first
        self._is_kept[texts_B] = 1
        for name, (part, index) in self._names.items():
            x = self._watched.parts(index)[part].to("cpu", torch.float16)
            rows, places = (x[is_known_B], texts_B) if part == "first_token" else (x[mask_BT], tokens_N)
            if not rows.isfinite().all():
                message = f"'{part}' of the teacher's layer {index} has numbers that 16 bits cannot hold."
                raise StageFailed("spec_invalid", message, suggestion="Leave this layer out of the answer stage.")
            self.tensors[name][places] = rows

    def rows(self, start: int, end: int) -> dict[str, Tensor]:
        """Returns what is kept of some texts, and of which of them; what is put there is kept."""
        texts = slice(start - self._first, end - self._first)
        tokens = slice(*(self._places.starts[[start, end]] - self._places.starts[self._first]))
        kept = {
            name: self.tensors[name][texts if part == "first_token" else tokens]
            for name, (part, _) in self._names.items()
        }
        return {"is_kept": self._is_kept[texts], **kept}

    def save(self, folder: Path, number: int = 0) -> Path:
        """Writes what was kept as the shard of this number, and returns its file.

        Raises:
            StageFailed: The model was not seen to read each text by itself, as one that takes no attention mask.
        """
        is_found = self._places.is_found[self._first : self._first + len(self._is_kept)]
        if not self._is_kept[is_found].all():
            message = "This teacher reads texts together with their padding, so its layers cannot be kept."
            raise StageFailed("spec_invalid", message, suggestion="Leave layers out of the answer stage.")
        about = {"tokens": self._places.digest, "sizes": self._watched.sizes._asdict(), "groups": self._watched.groups}
        path = shard_path(folder, LAYERS, number)
        save_file(self.tensors, path, metadata={"about": json.dumps(about, sort_keys=True)})
        return path


def _count_from_0(part: str, layers: Any, num_layers: int) -> list[int]:
    wrong = [layer for layer in layers if not -num_layers <= layer < num_layers]
    if wrong:
        message = f"layers.{part} names layer {wrong[0]}; the teacher has {num_layers} layers, counted from 0."
        raise StageFailed("spec_invalid", message, suggestion="Name layers that are there.")
    return sorted({layer % num_layers for layer in layers})


def _map(path: Path, num_rows: int, width: int) -> Tensor:
    """Returns zeros in a new file; all of its space is taken at once, as a full disk could not be told of later."""
    size = num_rows * width
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size * torch.float16.itemsize)
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.float16).view(num_rows, width)


class KeptLayers:
    """The layers of a teacher that an earlier stage kept.

    Raises:
        StageFailed: None were kept.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._shards = Shards(folder, LAYERS)
        if not self._shards:
            message = "The kept answers hold nothing of the teacher's layers."
            raise StageFailed("spec_invalid", message, suggestion="Set layers of the answer stage.")
        about = self._shards.about
        self.sizes, self._groups, self._digest = Sizes(**about["sizes"]), about["groups"], about["tokens"]
        self._device, self._wanted = device, dict[LayerPart, list[int]]()
        self._places: Places | None = None

    def ask(self, wanted: Wanted) -> None:
        """Checks that all of it was kept."""
        self._wanted = {part: sorted(indices) for part, indices in wanted.items()}
        missing = [
            f"'{part}' of layer {index}"
            for part, indices in self._wanted.items()
            for index in indices
            if f"{part}.{index}" not in self._shards.names
        ]
        if missing:
            message = f"The kept answers lack what the losses on layers compare: {', '.join(missing)}."
            hint = f"Set layers of the answer stage to {json.dumps(self._wanted)}."
            raise StageFailed("spec_invalid", message, suggestion=hint)

    def find(self, data: Encoded | Blocks) -> None:
        """Learns where the texts of a split are. Raises StageFailed for other tokens than the teacher read."""
        if self._places is not None:
            return
        self._places = Places(data)
        if self._places.digest != self._digest:
            message = "The teacher's layers were kept for other tokens than the student reads."
            hint = "Choose a student with the teacher's tokenizer, and the same max_length in both stages."
            raise StageFailed("vocab_incompatible", message, suggestion=hint)

    def see(self, inputs: Inputs) -> None:
        """Turns to a batch."""
        assert self._places is not None  # noqa: S101
        self._texts_B, self._mask_BT = self._places.find(inputs), mask_of(inputs).cpu()
        self._tokens_N = self._places.tokens(self._texts_B)

    def take(self, index: int) -> Layer:
        """Returns what was kept of a layer for the batch; zeros where no token is."""
        parts = {part: self._read(part, index) for part, indices in self._wanted.items() if index in indices}
        return make_layer(parts, self.sizes.num_attention_heads, self._groups)

    def _read(self, part: LayerPart, index: int) -> Tensor:
        is_of_texts = part == "first_token"
        [kept] = self._shards.read([f"{part}.{index}"], self._texts_B if is_of_texts else self._tokens_N)
        if is_of_texts:
            return kept.to(self._device)
        x_BTD = kept.new_zeros(*self._mask_BT.shape, kept.shape[1])
        x_BTD[self._mask_BT] = kept
        return x_BTD.to(self._device)
