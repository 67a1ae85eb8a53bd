"""What methods have in common that leave parts of a model out, round them, or share them."""

from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from core.methods import ModelFacts, Problem, Widths
from core.models.widths import DIVIDED_STATES, OWN_HEADS
from core.registry import Method
from core.strict import StrictModel

# Architectures whose layers narrowing cannot take apart: heads mixed in one map, experts, maps that are no linear ones.
NEVER_NARROWED = (
    *("bloom", "canine", "deberta", "deepseek_v2", "deepseek_v3", "falcon", "fnet", "gpt_bigcode", "gpt_neox"),
    *("gpt_oss", "ibert", "jetmoe", "longformer", "luke", "minicpm3", "minimax", "mistral4", "mixtral", "mobilebert"),
    *("mpt", "persimmon", "phi3", "phimoe", "qwen2_moe", "qwen3_moe", "squeezebert"),
)
# Those of which it can leave out neurons, and no states.
STATES_STAY = ("convbert", "esm", "markuplm", "mpnet", "nystromformer", "roc_bert")


class Importance(Method):
    """How much a neuron or a group of attention heads counts; the least important ones are pruned first."""

    family: ClassVar[str] = "pruning"
    needs_gradients: ClassVar[bool] = False  # of the loss on labels

    def build(self, ctx: Any) -> Any:
        """Returns a callable `(site) -> importance_I` of each input of a linear map (torch).

        `site` is a `worker.engine.importance.Site`: what a sample of the data showed of them.
        """
        raise NotImplementedError


class Narrowed(NamedTuple):
    """A model that is to have fewer states, heads or neurons, as far as it is known: what it is called, and its sizes.

    `start` is what it is made of.
    """

    role: str
    start: ModelFacts
    states: int | None
    num_heads: int | None
    widths: Widths | None

    def check(self, hidden_size: int | None, num_heads: int | None, intermediate_size: int | None) -> list[Problem]:
        """Returns the first width that it cannot have; fields are those."""
        asked = {"hidden_size": hidden_size, "num_heads": num_heads, "intermediate_size": intermediate_size}
        field, kind = next((name for name, size in asked.items() if size), None), self.start.model_type
        if field is None:
            return []
        if kind in NEVER_NARROWED or (hidden_size and kind in STATES_STAY):
            why = f"a '{kind}' is built in a way in which this cannot be narrowed"
            return [Problem(field, f"{why}; leave it out, or keep fewer layers")]
        unfit = self._check_states(hidden_size, num_heads) if hidden_size else None
        if unfit:
            return [Problem("hidden_size", unfit)]
        unfit = self._check_heads(num_heads, hidden_size or self.states) if num_heads else None
        if unfit:
            return [Problem("num_heads", unfit)]
        return self._check_known(self.widths, field, asked) if self.widths else []

    def _check_states(self, hidden_size: int, num_heads: int | None) -> str | None:
        states, heads = self.states, self.num_heads
        if hidden_size == self.start.embedding_size != states:
            why = "so wide are its embeddings, and the map from them to the states has no place then"
            return f"{why}; choose another number"
        if states and hidden_size > states:
            why = f"the {self.role} has {states} states, and what is left of it cannot be wider"
            return f"{why}; choose at most as many"
        if states and heads and not num_heads and (hidden_size * heads) % states:
            return f"heads of the {self.role} are {states // heads} wide; choose a multiple of that"
        return None

    def _check_heads(self, num_heads: int, states: int | None) -> str | None:
        kind = self.start.model_type
        if kind not in OWN_HEADS:
            why = f"a '{kind}' is not known to have a width of a head in its config, so that heads go with states alone"
            return f"{why}; leave it out, or set hidden_size"
        if self.num_heads and num_heads > self.num_heads:
            return f"the {self.role} has {self.num_heads} heads; choose at most as many"
        if kind in DIVIDED_STATES and states and states % num_heads:
            return f"heads of a '{kind}' divide its states, of which there are {states}; choose a divisor"
        return None

    def _check_known(self, widths: Widths, field: str, asked: dict[str, int | None]) -> list[Problem]:
        if (asked["intermediate_size"] or 0) > widths.inner:
            why = f"a layer of the {self.role} has {widths.inner} neurons; choose at most as many"
            return [Problem("intermediate_size", why)]
        if not widths.are_distinct:
            why = f"in a layer of {widths.states} states and {widths.inner} neurons they cannot be told apart"
            return [Problem(field, f"{why}; leave it out")]
        if widths.narrowed(asked["hidden_size"], None, asked["num_heads"]):
            return []
        if asked["num_heads"]:
            why = f"{widths.num_heads // widths.num_groups} heads share keys; choose a multiple of that"
            return [Problem("num_heads", why)]
        why = f"heads share keys in groups of {widths.states // widths.num_groups} states; choose a multiple of that"
        return [Problem("hidden_size", why)]


class Sparsity(Method):
    """Which single weights of a matrix become zero, and what becomes of the others.

    `scope` says whether weights are compared within one output's row or all of the matrix, unless the stage says so.
    """

    family: ClassVar[str] = "sparsity"
    needs_data: ClassVar[bool] = False
    scope: ClassVar[Literal["row", "tensor"]] = "tensor"

    def build(self, ctx: Any) -> Any:
        """Returns a callable `(matrix, choose, group) -> weight_OI` (torch).

        `matrix` is a `worker.engine.matrices.Matrix`, `choose` tells of scores_OI which weights stay, and `group` is
        how many inputs a pattern compares, None without one.
        """
        raise NotImplementedError


class Zeros(StrictModel):
    """How many of the weights of a model's layers become zero."""

    share: float = Field(0.5, gt=0, lt=1, description="Share of the weights that become zero.")
    pattern: str | None = Field(
        None,
        pattern=r"^\d{1,3}:\d{1,3}$",
        description="`n:m` instead of a share: n of each m weights in a row stay, as 2:4, which GPUs compute faster.",
        examples=["2:4", "4:8"],
    )

    @field_validator("pattern")
    @classmethod
    def _keeps_some(cls, value: str | None) -> str | None:
        n, m = map(int, (value or "1:2").split(":"))
        if not 0 < n < m:
            why = "'{value}' keeps none or all; n must lie between 0 and m, as in '2:4'"
            raise PydanticCustomError("pattern", why, {"value": value})
        return value

    @property
    def numbers(self) -> tuple[int, int] | None:
        """The two numbers of the pattern."""
        if self.pattern is None:
            return None
        n, m = map(int, self.pattern.split(":"))
        return n, m

    @property
    def group(self) -> int:
        """How many weights in a row are compared, which must divide its length; 1 without a pattern."""
        return self.numbers[1] if self.numbers else 1

    def find_unfit(self, odd: int | None, widths: Widths | None, *, by_row: bool) -> list[Problem]:
        """Returns whether its groups do not divide so many inputs, or it leaves nothing of a row, or of a matrix."""
        why = {"pattern": self._say_undivided(odd) if odd else None, "share": self._find_emptied(widths, by_row=by_row)}
        return [Problem(field, message) for field, message in why.items() if message]

    def _find_emptied(self, widths: Widths | None, *, by_row: bool) -> str | None:
        if widths is None or self.numbers:
            return None
        found = widths.sizes()
        least = min(found[axis] for axis in "hia") * (1 if by_row else found["h"])
        if round(self.share * least) < least:
            return None
        what = "a row" if by_row else "a matrix"
        return f"it leaves none of the {least:,} weights of {what}; choose at most {1 - 1 / least:.6f}"

    def _say_undivided(self, size: int) -> str:
        return f"groups of {self.group} do not divide the {size} inputs of a matrix; choose another pattern, or a share"


class Rounding(Method):
    """How the weights of a matrix get on a grid of few values.

    `needs_norms` says whether it comes to nothing in a model none of whose norms takes the scales of `build_scaling`,
    and `only` has what settings of the stage must be.
    """

    family: ClassVar[str] = "quantization"
    needs_data: ClassVar[bool] = False
    needs_norms: ClassVar[bool] = False
    only: ClassVar[dict[str, Any]] = {}

    def build(self, ctx: Any) -> Any:
        """Returns a callable `(matrix, fit, group) -> (weight_OI, grid)` (torch).

        `matrix` is a `worker.engine.matrices.Matrix`, `fit` gives the `worker.kernels.grids.Grid` for weight_OI and a
        group, and `group` is how many inputs share a scale, None for all of a row.
        """
        raise NotImplementedError

    def build_scaling(self, ctx: Any) -> Any:  # noqa: ARG002 - most take matrices as they are
        """Returns a callable `(matrices, rounds) -> scale_I` (torch), or None where nothing is scaled.

        The matrices hear the same; their weights are multiplied by the scale, and what they hear divided by it, before
        they are rounded. `rounds` has for each a callable that puts weight_OI to the nearest values of its grid.
        """
        return None


class Adaptee(NamedTuple):
    """A model that gets an adapter, as far as it is known: what it starts from, its layers, and its longest text."""

    role: str
    is_classifier: bool
    start: ModelFacts
    num_layers: int | None
    longest: int


class Adapter(Method):
    """A few weights that alone are trained, with the head, beside a model that is frozen.

    `is_merged` says whether they can become part of the model's own weights, and do where one task has the model.
    """

    family: ClassVar[str] = "sharing"
    is_merged: ClassVar[bool] = True

    def check_model(self, adaptee: Adaptee) -> list[Problem]:  # noqa: ARG002 - most fit any model
        """Returns what does not fit the model; fields are relative to the adapter."""
        return []

    def build(self, ctx: Any) -> Any:
        """Returns a callable `(model) -> config` of the library `peft` (torch)."""
        raise NotImplementedError


class MatrixAdapter(Adapter):
    """An adapter of matrices of the layers; it has no kind of its own."""

    layers: list[int] | None = Field(
        None, min_length=1, max_length=512, description="Layers that get it, counted from 0; null for all."
    )
    parts: Literal["all", "attention", "feed_forward"] = Field("all", description="Which matrices of a layer get it.")

    def check_model(self, adaptee: Adaptee) -> list[Problem]:
        """Returns the first layer that is not there."""
        role, count = adaptee.role, adaptee.num_layers
        missing = [layer for layer in self.layers or () if count is not None and not 0 <= layer < count]
        why = "there is no layer {}; the {} has {}, counted from 0"
        return [Problem("layers", why.format(layer, role, count)) for layer in missing[:1]]
