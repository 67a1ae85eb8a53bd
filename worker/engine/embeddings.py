"""Training of those rows of an embedding alone that the data use.

A small model's parameters are mostly rows for tokens, and a data set uses a tenth of them. The others get no gradient,
but an optimiser goes through them in every step, which takes longer than to compute the gradient of all layers.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Embedding
from transformers import PreTrainedModel

MOST_USED = 0.5  # of the rows; with more the saving is not worth the detour


class UsedRows(Embedding):
    """An embedding whose `weight` holds only the rows that are trained; of other tokens it gives the rows they had.

    It gives what the whole one would; but its unused rows are not decayed.
    """

    _index_V: Tensor
    _whole_VD: Tensor

    def __init__(self, whole: Embedding, used_U: Tensor) -> None:
        super().__init__(len(used_U), whole.embedding_dim, device=whole.weight.device, dtype=whole.weight.dtype)
        index_V = torch.full((whole.num_embeddings,), -1, device=whole.weight.device)
        index_V[used_U] = torch.arange(len(used_U), device=whole.weight.device)
        self.load_state_dict({"weight": whole.weight[used_U]})
        self.register_buffer("_index_V", index_V, persistent=False)
        self.register_buffer("_whole_VD", whole.weight.detach(), persistent=False)
        self._pad = whole.padding_idx
        place = -1 if self._pad is None else int(index_V[self._pad])
        self.padding_idx = place if place >= 0 else None

    def forward(self, input: Tensor) -> Tensor:
        """Returns the rows of tokens."""
        index = self._index_V[input]
        found = F.embedding(index.clamp_min(0), self.weight, self.padding_idx)
        return torch.where(index[..., None] < 0, F.embedding(input, self._whole_VD), found)

    def whole(self) -> Embedding:
        """Returns an ordinary embedding with all rows."""
        weight_VD = self._whole_VD.clone()
        weight_VD[self._index_V >= 0] = self.weight.detach()[self._index_V[self._index_V >= 0]]
        num_rows, width = weight_VD.shape
        return Embedding(num_rows, width, padding_idx=self._pad, _weight=weight_VD)


def train_used_rows(model: PreTrainedModel, used: NDArray[np.int64]) -> None:
    """Lets the model train only these rows of its embedding, where that saves something; `whole_rows` ends it.

    An embedding that is the last layer, too, or on a grid, is trained as a whole. Tokens without a row do not count: a
    tokenizer may know some that its model never reads.
    """
    whole, last = model.get_input_embeddings(), model.get_output_embeddings()
    is_last = last is not None and last.weight is whole.weight
    if type(whole) is not Embedding or not whole.weight.requires_grad or is_last:
        return
    used = used[used < whole.num_embeddings]
    if len(used) < MOST_USED * whole.num_embeddings:
        model.set_input_embeddings(UsedRows(whole, torch.from_numpy(used).to(whole.weight.device)))


def whole_rows(model: PreTrainedModel) -> None:
    """Gives the model its ordinary embedding back, with what was learned."""
    rows = model.get_input_embeddings()
    if isinstance(rows, UsedRows):
        model.set_input_embeddings(rows.whole())
