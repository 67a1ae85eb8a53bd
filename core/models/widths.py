"""How a model's number of parameters follows from its widths, read from the names and shapes of its tensors."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from core.models.safetensors_header import Tensor

# The axes of a weight, then of its bias, by the end of a module's name. h: states; i: neurons; a: all heads together;
# k: all groups; d: a head; q: three times a; g: twice i; *: what no width changes, such as the words of a vocabulary.
BERT = {
    "word_embeddings position_embeddings token_type_embeddings": "*h",
    "LayerNorm layer_norm": "h h",
    "query key value": "ah a",
    "attention.output.dense": "ha h",
    "intermediate.dense": "ih i",
    "output.dense": "hi h",
    "pooler.dense transform.dense classifier.dense lm_head.dense": "hh h",
    "classifier out_proj seq_relationship": "*h *",
    "decoder": "*h",
    "predictions lm_head": "- *",  # a bias alone
}
ELECTRA = BERT | {
    "discriminator_predictions.dense generator_predictions.dense": "hh h",
    "dense_prediction generator_lm_head": "*h *",
}
DISTILBERT = {
    "word_embeddings position_embeddings": "*h",
    "LayerNorm sa_layer_norm output_layer_norm vocab_layer_norm": "h h",
    "q_lin k_lin v_lin": "ah a",
    "out_lin": "ha h",
    "lin1": "ih i",
    "lin2": "hi h",
    "pre_classifier vocab_transform": "hh h",
    "classifier vocab_projector": "*h *",
}
MODERNBERT = {
    "tok_embeddings": "*h",
    "norm attn_norm mlp_norm final_norm": "h h",
    "Wqkv": "qh q",
    "attn.Wo": "ha h",
    "Wi": "gh g",
    "mlp.Wo": "hi h",
    "head.dense": "hh h",
    "classifier decoder": "*h *",
}
GPT2 = {
    "wte wpe": "*h",
    "ln_1 ln_2 ln_f": "h h",
    "c_attn": "hq q",
    "attn.c_proj": "ah h",
    "c_fc": "hi i",
    "mlp.c_proj": "ih h",
    "lm_head score": "*h *",
}
LLAMA = {
    "embed_tokens": "*h",
    "norm input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm": "h h",
    "q_proj": "ah a",
    "k_proj v_proj": "kh k",
    "o_proj": "ha h",
    "q_norm k_norm": "d",
    "gate_proj up_proj": "ih i",
    "down_proj": "hi h",
    "lm_head score": "*h *",
}
KINDS = {
    "bert roberta xlm-roberta": BERT,
    "electra": ELECTRA,
    "distilbert": DISTILBERT,
    "modernbert": MODERNBERT,
    "gpt2": GPT2,
    "llama mistral ministral3 qwen2 qwen3 smollm3 gemma gemma2 gemma3_text cohere2 granite olmo arcee ernie4_5 "
    "exaone4 seed_oss stablelm nemotron": LLAMA,
}
KNOWN = {
    kind: {end: axes.split() for ends, axes in known.items() for end in ends.split()}
    for kinds, known in KINDS.items()
    for kind in kinds.split()
}
OWN_HEADS = (  # whose config says how wide a head is, so that there can be fewer of them beside as many states
    *("llama", "mistral", "ministral3", "qwen3", "gemma", "gemma2", "gemma3_text", "cohere2", "arcee", "ernie4_5"),
    *("seed_oss", "nemotron"),
)
DIVIDED_STATES = ("llama", "gemma2", "gemma3_text", "arcee")  # whose config has heads divide the states all the same
SPLIT_STATES = (  # among heads, where the config does not say how wide these are
    *("llama", "mistral", "qwen2", "smollm3", "granite", "olmo", "arcee", "exaone4", "stablelm", "nemotron"),
)
TOLD = (*KNOWN, "deberta", "deberta-v2", "mpnet")  # whose config tells how wide the matrices of a layer are
OUTPUTS = ("lm_head.weight", "decoder.weight", "vocab_projector.weight")  # where they are not the embeddings once more
MULTIPLES = {"q": ("a", 3), "g": ("i", 2)}
PARTS = {"weight": 0, "gamma": 0, "bias": 1, "beta": 1}  # the Greek ones are those of old files
LAYER = re.compile(r"(?:.*\.)?(?:layer|layers|h)\.(\d+)\.")
Terms = dict[str, int]


class Widths(BaseModel):
    """The widths of a model: states, neurons of a layer, a head, and heads, in groups that share keys and values."""

    model_config = ConfigDict(frozen=True)

    states: int
    inner: int
    head: int
    num_heads: int
    num_groups: int

    @property
    def are_distinct(self) -> bool:
        """Whether states and neurons can be told apart by how many there are, also where a gate lies beside these."""
        return self.states not in (self.inner, 2 * self.inner)

    def narrowed(self, states: int | None, inner: int | None, num_heads: int | None = None) -> "Widths | None":
        """Returns those of a narrower model, with heads as wide as these; None where the widths cannot be.

        Of heads there are as many as asked for, or as is their share of the states.
        """
        width, inner = states or self.states, inner or self.inner
        heads, lost = (num_heads, 0) if num_heads else divmod(self.num_heads * width, self.states)
        groups, lost_too = divmod(self.num_groups * heads, self.num_heads)
        is_wider = width > self.states or inner > self.inner or heads > self.num_heads
        if is_wider or lost or lost_too or not groups:
            return None
        return Widths(states=width, inner=inner, head=self.head, num_heads=heads, num_groups=groups)

    def resized(self, states: int | None, num_heads: int | None, inner: int | None) -> "Widths":
        """Returns those of a new model, in these proportions where nothing is asked for."""
        width = states or self.states
        heads = num_heads or scale_heads(self.num_heads, self.states, width)
        return Widths(
            states=width,
            inner=inner or round(self.inner * width / self.states),
            head=width // heads,
            num_heads=heads,
            num_groups=math.gcd(heads, self.num_groups),
        )

    def sizes(self) -> dict[str, int]:
        """Returns the sizes of axes by their letters."""
        heads, groups = self.num_heads * self.head, self.num_groups * self.head
        return {"h": self.states, "i": self.inner, "a": heads, "k": groups, "d": self.head}

    def undivided(self, group: int, axes: str = "hia") -> int | None:
        """Returns which inputs of a layer's matrices groups of so many do not divide; None if they divide all."""
        return next((size for letter, size in self.sizes().items() if letter in axes and size % group), None)


def scale_heads(num_heads: int, states: int, width: int) -> int:
    """Returns how many heads a model of so wide states has whose heads are as wide as those of another one."""
    return max(1, width * num_heads // states)


class Composition(BaseModel):
    """How many parameters a model has at which widths: each term is so many times the product of its letters' sizes.

    The letters are h for states, i for neurons of a layer, a for all heads together, k for all groups that share keys
    and values, d for a head.
    """

    model_config = ConfigDict(frozen=True)

    widths: Widths
    outside: Terms = Field(description="Outside the layers.", examples=[{"h": 31_092, "hh": 1, "": 2}])
    first_layer: Terms
    other_layer: Terms | None = Field(description="Of each layer but the first, which may lack a norm.")

    def count(self, widths: Widths, num_layers: int) -> int | None:
        """Returns how many parameters such a model of these widths has; None if its further layers are not known."""
        sizes = widths.sizes()
        total = _sum(self.outside, sizes) + _sum(self.first_layer, sizes)
        if num_layers == 1:
            return total
        return None if self.other_layer is None else total + (num_layers - 1) * _sum(self.other_layer, sizes)

    def count_least(self, widths: Widths, num_rows: int) -> int:
        """Returns how many parameters one layer and embeddings of so many rows have, whatever head comes after them."""
        return _sum(self.first_layer, widths.sizes()) + num_rows * widths.states


def find_composition(
    config: dict[str, Any], tensors: Iterable[Tensor], states: int | None, num_heads: int | None
) -> Composition | None:
    """Returns how the parameters follow from the widths; None unless names say so of every axis of every tensor.

    Sizes alone would not: 1,024 states and 1,024 positions look alike. But each letter must have one size everywhere,
    which `states` and `num_heads` of the config must explain.
    """
    known, is_tied = KNOWN.get(config["model_type"], {}), config.get("tie_word_embeddings", True)
    sizes: dict[str, set[int]] = {letter: set() for letter in "hiakd"}
    parts: dict[int, Counter[str]] = {}  # by the layer's number, -1 for what is outside
    for tensor in tensors:
        axes = _find_axes(known, tensor)
        if axes is None or (is_tied and tensor.name.endswith(OUTPUTS)):  # a copy, that is no parameter
            return None
        number = LAYER.match(tensor.name)
        _add_term(parts.setdefault(int(number[1]) if number else -1, Counter()), sizes, axes, tensor.shape)
    widths, outside = _read_widths(sizes, states, num_heads), parts.pop(-1, Counter())
    layers = [dict(parts[number]) for number in sorted(parts)]
    is_even = all(layer == layers[1] for layer in layers[2:])
    if widths is None or not layers or not is_even or sorted(parts) != list(range(len(parts))):
        return None
    other = layers[1] if len(layers) > 1 else None
    return Composition(widths=widths, outside=dict(outside), first_layer=layers[0], other_layer=other)


def read_widths(config: dict[str, Any], states: int | None, num_heads: int | None) -> Widths | None:
    """Returns the widths that a config tells of an architecture whose layers are known; None of any other."""
    kind = config["model_type"]
    if kind not in TOLD or not states or not num_heads:
        return None
    inner = config.get({"distilbert": "hidden_dim", "gpt2": "n_inner"}.get(kind, "intermediate_size"))
    if kind == "gpt2" and inner is None:
        inner = 4 * states
    splits = KNOWN.get(kind) is not KNOWN["llama"] or kind in SPLIT_STATES
    head = config.get("head_dim") or (states // num_heads if splits else None)
    groups = config.get("num_key_value_heads") or num_heads
    if not all(type(number) is int and number > 0 for number in (states, num_heads, inner, head, groups)):
        return None
    return Widths(states=states, inner=inner, head=head, num_heads=num_heads, num_groups=groups)


def _add_term(terms: Counter[str], sizes: dict[str, set[int]], axes: str, shape: tuple[int, ...]) -> None:
    """Adds a tensor's elements to the terms, and the sizes of its axes to those of their letters."""
    factor, letters = 1, ""
    for axis, size in zip(axes, shape, strict=True):
        letter, times = MULTIPLES.get(axis, (axis, 1))
        if letter == "*":
            factor *= size
        else:
            sizes[letter].add(size // times if size % times == 0 else 0)
            factor, letters = factor * times, letters + letter
    terms["".join(sorted(letters))] += factor


def _find_axes(known: dict[str, list[str]], tensor: Tensor) -> str | None:
    """Returns a letter for each axis of a tensor."""
    module, _, part = tensor.name.rpartition(".")
    names = module.split(".")
    found = next((known[end] for start in range(len(names)) if (end := ".".join(names[start:])) in known), [])
    place = PARTS.get(part, len(found))
    is_known = place < len(found) and found[place] != "-" and len(found[place]) == len(tensor.shape)
    return found[place] if is_known else None


def _read_widths(sizes: dict[str, set[int]], states: int | None, num_heads: int | None) -> Widths | None:
    """Returns the widths that make all these sizes, with the states and heads of the config; None if there are none."""
    first = {letter: min(found) for letter, found in sizes.items() if found}
    if not num_heads or num_heads < 0 or not {"h", "i", "a"} <= first.keys() or 0 in first.values():
        return None
    head = max(1, first["a"] // num_heads)
    groups = first.get("k", first["a"]) // head
    widths = Widths(states=first["h"], inner=first["i"], head=head, num_heads=num_heads, num_groups=groups)
    exact = widths.sizes()
    fits = all(found <= {exact[letter]} for letter, found in sizes.items()) and widths.states == states
    return widths if fits else None


def _sum(terms: Terms, sizes: dict[str, int]) -> int:
    return sum(factor * math.prod(sizes[letter] for letter in letters) for letters, factor in terms.items())
