"""What layers of a teacher compute, kept by the stage `answer` for losses on them, and read without the teacher.

`layers.safetensors` holds `<part>.<layer>`: for `first_token` a row for each text of the training split, else one for
each of its tokens, in float16. A text is found by the tokens that are read of it, so it does not matter how a batch is
put together, nor which rows the task counts. Its metadata hold, as JSON under `about`, a digest of all these tokens,
the sizes of the teacher, and how many heads share one of keys and values.
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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from core.errors import StageFailed
from core.losses import LayerPart
from worker.engine.blocks import Blocks
from worker.engine.data import Encoded, mask_of
from worker.engine.features import Layer, Sizes, Wanted, make_layer
from worker.engine.loading import INPUT_NAMES
from worker.engine.watching import Watched

if TYPE_CHECKING:
    from worker.engine.context import StageContext

LAYERS_FILE = "layers.safetensors"
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

    @property
    def texts(self) -> list[int]:
        """The texts that can be found: of several with the same tokens the first."""
        return list(self._text_of.values())

    def find(self, inputs: Inputs) -> Tensor:
        """Returns the number of each text of a batch, texts_B, and NOWHERE for one that is not in the split."""
        return torch.tensor([self._text_of.get(key, NOWHERE) for key in read_keys(inputs)])

    def tokens(self, texts_B: Tensor) -> Tensor:
        """Returns the numbers of all tokens of some texts, text by text, as a mask of their batch picks them."""
        spans = [torch.arange(self.starts[text], self.starts[text + 1]) for text in texts_B.tolist()]
        return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)


class Recorder:
    """Keeps what layers of a model compute, whenever it reads a text of a split.

    Attributes:
        tensors: What is kept, in files that are mapped into memory, so that it need not fit there.
        is_on: Whether it is to keep what the model reads.
    """

    def __init__(self, ctx: "StageContext", model: PreTrainedModel, data: Encoded | Blocks, layers: Wanted) -> None:
        self._watched, self._places, base = Watched(model), Places(data), model.base_model
        self._is_kept = torch.zeros(len(data), dtype=torch.uint8)
        wanted = {part: _count_from_0(part, found, self._watched.sizes.num_layers) for part, found in layers.items()}
        self._watched.ask(wanted)
        self._names = {f"{part}.{index}": (part, index) for part, found in wanted.items() for index in found}
        with torch.no_grad():  # one text shows how wide everything is
            base(**{name: ids.to(model.device) for name, ids in data.single(0).items()})
        self.tensors: dict[str, Tensor] = {}
        self.is_on = True
        for name, (part, index) in self._names.items():
            num_rows = len(data) if part == "first_token" else int(self._places.starts[-1])
            shape = num_rows, self._watched.parts(index)[part].shape[-1]
            self.tensors[name] = _map(ctx.scratch_dir / f"{name}.bin", *shape)
        self._signature = inspect.signature(base.forward)
        base.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, _: Module, given: tuple[Any, ...], named: dict[str, Any], __: Any) -> None:
        if not self.is_on:
            return
        bound = self._signature.bind(*given, **named).arguments
        inputs = {name: bound[name] for name in INPUT_NAMES if isinstance(bound.get(name), Tensor)}
        texts_B = self._places.find(inputs)
        is_known_B = texts_B != NOWHERE
        texts_B, mask_BT = texts_B[is_known_B], mask_of(inputs).cpu() & is_known_B[:, None]
        self._is_kept[texts_B] = 1
        tokens_N = self._places.tokens(texts_B)
        for name, (part, index) in self._names.items():
            x = self._watched.parts(index)[part].to("cpu", torch.float16)
            rows, places = (x[is_known_B], texts_B) if part == "first_token" else (x[mask_BT], tokens_N)
            if not rows.isfinite().all():
                message = f"'{part}' of the teacher's layer {index} has numbers that 16 bits cannot hold."
                raise StageFailed("spec_invalid", message, suggestion="Leave this layer out of the answer stage.")
            self.tensors[name][places] = rows

    def rows(self, start: int, end: int) -> dict[str, Tensor]:
        """Returns what is kept of some texts, and of which of them; what is put there is kept."""
        texts, tokens = slice(start, end), slice(*self._places.starts[[start, end]])
        kept = {
            name: self.tensors[name][texts if part == "first_token" else tokens]
            for name, (part, _) in self._names.items()
        }
        return {"is_kept": self._is_kept[texts], **kept}

    def save(self, folder: Path) -> None:
        """Writes what was kept.

        Raises:
            StageFailed: The model was not seen to read each text by itself, as one that takes no attention mask.
        """
        if not self._is_kept[self._places.texts].all():
            message = "This teacher reads texts together with their padding, so its layers cannot be kept."
            raise StageFailed("spec_invalid", message, suggestion="Leave layers out of the answer stage.")
        about = {"tokens": self._places.digest, "sizes": self._watched.sizes._asdict(), "groups": self._watched.groups}
        save_file(self.tensors, folder / LAYERS_FILE, metadata={"about": json.dumps(about, sort_keys=True)})


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
        path = folder / LAYERS_FILE
        if not path.is_file():
            message = "The kept answers hold nothing of the teacher's layers."
            raise StageFailed("spec_invalid", message, suggestion="Set layers of the answer stage.")
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
        self.sizes, self._groups, self._digest = Sizes(**about["sizes"]), about["groups"], about["tokens"]
        self._tensors = load_file(path)  # mapped into memory, so that only what is asked for is read
        self._device, self._wanted = device, dict[LayerPart, list[int]]()
        self._places: Places | None = None

    def ask(self, wanted: Wanted) -> None:
        """Checks that all of it was kept."""
        self._wanted = {part: sorted(indices) for part, indices in wanted.items()}
        missing = [
            f"'{part}' of layer {index}"
            for part, indices in self._wanted.items()
            for index in indices
            if f"{part}.{index}" not in self._tensors
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
        kept = self._tensors[f"{part}.{index}"]
        if part == "first_token":
            return kept[self._texts_B].to(self._device)
        x_BTD = kept.new_zeros(*self._mask_BT.shape, kept.shape[1])
        x_BTD[self._mask_BT] = kept[self._tokens_N]
        return x_BTD.to(self._device)
