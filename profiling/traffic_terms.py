"""The byte model's vocabulary: tensors that a pass reads and writes, and how a model is trained.

A layer's pass is a list of terms, one for each tensor that lies in memory between kernels:

    bytes = sum over terms of (size of the tensor) * (times read + times written)

A kernel is taken to read what it needs once and to write what it makes once. Matrix products are
kernels of their own, with what is elementwise between them: what lies between two kernels is
counted, though an L2 cache may hold it where tokens are few. Counters, workspaces and padding are
not counted. Where a layer is made of operators, each term is what one of them does to the tensor:
one writes it, another one reads it.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from .record import Bytes, Phase
from .traffic_routing import Routing, expected_distinct

Pass = Literal["inference", "forward", "backward", "optimizer"]
"""inference: a forward pass without gradients. forward: one that saves what backward needs."""
Part = Literal["weights", "keys", "rows", "activations"]
TableGradient = Literal["deferred", "main_grad"]

PASSES: Mapping[Phase, tuple[Pass, ...]] = {
    "decode": ("inference",),
    "training": ("forward", "backward"),
    "optimizer": ("optimizer",),
}
ELEMENT_BYTES = (2, 4)
FLOAT32 = 4
INT64 = 8


@dataclass(frozen=True)
class Term:
    """One tensor, and how often a pass, or one operator of it, goes through it."""

    name: str
    part: Part
    nbytes: float
    """Of the tensor; of rows, each counted for every token that uses it."""
    reads: float = 0
    writes: float = 0
    distinct_nbytes: float | None = None
    """Of rows: each counted once. None where that is the same."""
    operator: str = ""
    """Whose kernels these are, in a memory layer's passes over tokens: a function of
    ``ultramem_cuda.ops`` ("value_ffn"), or the layer's "pre_proj" or "value_proj"; its backward
    has the same name. Empty elsewhere."""

    def bytes(self) -> Bytes:
        times = self.reads + self.writes
        moved = self.nbytes * times
        if self.part == "activations":
            return Bytes(activations=moved)
        if self.part == "rows":
            distinct = self.nbytes if self.distinct_nbytes is None else self.distinct_nbytes
            return Bytes(gathered=moved, distinct=distinct * times)
        return Bytes(dense=moved)


Terms = tuple[Term, ...]


def total(terms: Iterable[Term]) -> Bytes:
    """What all of them move."""
    return sum((term.bytes() for term in terms), Bytes())


def of_operator(operator: str, terms: Iterable[Term]) -> Terms:
    """The same terms, as those of one operator."""
    return tuple(dataclasses.replace(term, operator=operator) for term in terms)


def activations(tokens: float, table: Sequence[tuple[str, int, int, int]]) -> Terms:
    """Terms from (name, bytes of a token, reads, writes); those of no bytes are left out."""
    return tuple(
        Term(name, "activations", tokens * nbytes, reads, writes)
        for name, nbytes, reads, writes in table
        if nbytes
    )


@dataclass(frozen=True)
class Optimizer:
    """Bytes that an optimizer keeps."""

    name: str
    state_bytes: int = 0
    """Of its states, for an element."""
    row_state_bytes: int = 0
    """Of its states, for a row of a table."""
    master_bytes: int = 0
    """Of a master copy, for an element; 0 without."""

    def terms(self, name: str, part: Part, elements: float, element_bytes: int) -> Terms:
        """Of an update, its gradient apart: weights, states and master, each read and written.

        With a master copy the weights are only written.
        """
        sizes = (
            (name, element_bytes, 0 if self.master_bytes else 1),
            (f"{name} states", self.state_bytes, 1),
            (f"{name} master", self.master_bytes, 1),
        )
        return tuple(
            Term(label, part, elements * size, reads=reads, writes=1)
            for label, size, reads in sizes
            if size
        )


SGD = Optimizer("MemorySGD")
ADAGRAD = Optimizer("MemoryAdagrad", row_state_bytes=4)
ADAM_BF16 = Optimizer("MemoryAdam bf16", state_bytes=4)
ADAM_FP32 = Optimizer("MemoryAdam fp32", state_bytes=8)
ADAMW_BF16 = Optimizer("AdamW bf16", state_bytes=4)
ADAMW_FP32 = Optimizer("AdamW fp32", state_bytes=8)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained, as far as its bytes depend on that.

    By default parameters, gradients and states of torch's fused AdamW are bfloat16, which is what
    it makes of bfloat16 parameters; the table has deferred gradients and MemoryAdam with bfloat16
    states. A layer's step is the one behind the training pass of the same tokens.
    """

    optimizer: Optimizer = ADAMW_BF16
    """Of all parameters but tables; touches all of them."""
    grad_bytes: int = 2
    """Of an element of their gradients."""
    accumulate: bool = False
    """Gradients are added to what is there and zeroed by the step; else written once and freed."""
    table_optimizer: Optimizer = ADAM_BF16
    table_gradient: TableGradient = "deferred"
    """deferred: factors, and a step over the touched rows. main_grad: a float32 gradient as large
    as the table, accumulated where rows are touched; the step goes over all rows and zeroes it."""
    clip: bool = False
    """The norm of all gradients is taken first, for which they are read once more."""

    def __post_init__(self) -> None:
        if self.grad_bytes not in ELEMENT_BYTES:
            raise ValueError(f"grad_bytes: must be 2 or 4, got {self.grad_bytes!r}")
        if self.table_gradient not in get_args(TableGradient):
            raise ValueError(
                f"table_gradient: must be one of {', '.join(get_args(TableGradient))}, "
                f"got {self.table_gradient!r}"
            )


DEFAULT_RECIPE = Recipe()


def gradient_terms(name: str, part: Part, elements: float, recipe: Recipe) -> Terms:
    """The gradient of a parameter that the backward pass makes."""
    nbytes = elements * recipe.grad_bytes
    return (Term(f"grad_{name}", part, nbytes, reads=int(recipe.accumulate), writes=1),)


def update_terms(
    name: str, part: Part, elements: float, element_bytes: int, recipe: Recipe
) -> Terms:
    """The step of a parameter whose every element is updated."""
    gradient = Term(
        f"grad_{name}",
        part,
        elements * recipe.grad_bytes,
        reads=2 if recipe.clip else 1,
        writes=int(recipe.accumulate),
    )
    return (gradient, *recipe.optimizer.terms(name, part, elements, element_bytes))


def weight_terms(
    which: Pass, name: str, elements: int, element_bytes: int, recipe: Recipe
) -> Terms:
    """A weight that every token uses: read forward, and backward for the gradient of its input."""
    if which == "optimizer":
        return update_terms(name, "weights", elements, element_bytes, recipe)
    weight = Term(name, "weights", elements * element_bytes, reads=1)
    if which == "backward":
        return (weight, *gradient_terms(name, "weights", elements, recipe))
    return (weight,)


def check_sizes(owner: object, **sizes: int) -> None:
    """Raise ValueError for a size that is not a positive integer."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{type(owner).__name__}: {name} must be at least 1, got {value!r}")


def check_element_bytes(owner: object, **sizes: int) -> None:
    """Raise ValueError for bytes of an element that are neither 2 nor 4."""
    for name, value in sizes.items():
        if value not in ELEMENT_BYTES:
            raise ValueError(f"{type(owner).__name__}: {name} must be 2 or 4, got {value!r}")


class Layer(abc.ABC):
    """Something that tokens [T, D] pass, and that moves bytes for them."""

    @property
    @abc.abstractmethod
    def token_bytes(self) -> int:
        """Of a token as it goes in, and as it comes out."""

    @abc.abstractmethod
    def terms(
        self,
        which: Pass,
        tokens: float,
        *,
        touched: float | None = None,
        recipe: Recipe = DEFAULT_RECIPE,
    ) -> Terms:
        """The tensors that one pass over ``tokens`` tokens goes through.

        Args:
            touched: distinct experts or rows that the tokens use, where they were counted; the
                expectation by default.
        """

    @abc.abstractmethod
    def pass_flops(self, which: Pass, tokens: float, recipe: Recipe = DEFAULT_RECIPE) -> float:
        """FLOPs of the matrix products and of the products with gathered rows; a multiply-add is
        two. Norms, activations, selection and elementwise updates are not counted."""

    @abc.abstractmethod
    def active_parameters(self) -> int:
        """Parameters that one token uses."""

    @abc.abstractmethod
    def total_parameters(self) -> int:
        """All parameters; of a table that layers share, this layer's share."""

    def traffic(
        self,
        phase: Phase,
        tokens: float,
        *,
        touched: float | None = None,
        recipe: Recipe = DEFAULT_RECIPE,
    ) -> Bytes:
        """Bytes of one phase over ``tokens`` tokens; see :meth:`terms`."""
        if tokens < 0:
            raise ValueError(f"tokens: must not be negative, got {tokens}")
        if tokens == 0:
            return Bytes()
        return sum(
            (
                total(self.terms(which, tokens, touched=touched, recipe=recipe))
                for which in PASSES[phase]
            ),
            Bytes(),
        )

    def flops(self, phase: Phase, tokens: float, recipe: Recipe = DEFAULT_RECIPE) -> float:
        """FLOPs of one phase; see :meth:`pass_flops`."""
        return sum(self.pass_flops(which, tokens, recipe) for which in PASSES[phase])

    def __add__(self, other: Layer) -> Layers:
        return Layers((*_parts(self), *_parts(other)))


class SparseLayer(Layer):
    """A layer of whose population (experts, rows) a token uses a few members."""

    routing: Routing | None
    """How the members are chosen; None for uniformly."""

    @property
    @abc.abstractmethod
    def population(self) -> int:
        """Experts, or rows of the window, to choose from."""

    @property
    @abc.abstractmethod
    def taken(self) -> int:
        """Members that a token uses."""

    def touched(self, tokens: float) -> float:
        """Expected number of distinct members that so many tokens use."""
        if self.routing is not None:
            return self.routing.expected_distinct(tokens)
        return expected_distinct(self.population, self.taken, tokens)

    def _check_routing(self) -> None:
        if self.routing is not None and self.routing.population != self.population:
            raise ValueError(
                f"routing: must be over the layer's {self.population} members, "
                f"got one over {self.routing.population}"
            )

    def _resolve(self, tokens: float, touched: float | None) -> float:
        if touched is None:
            return self.touched(tokens)
        most = min(self.population, tokens * self.taken)
        # An expectation for a single token may lie above by rounding.
        if not 0 <= touched <= most * (1 + 1e-9):
            raise ValueError(
                f"touched: must be in [0, {most:g}] for {tokens:g} tokens, got {touched}"
            )
        return touched


@dataclass(frozen=True)
class Layers(Layer):
    """Several layers side by side on the same tokens; a kernel of its own adds what they give.

    Per token, with n layers: n outputs are read and their sum [D] is written; in the backward pass
    so are the n gradients of the input.
    """

    parts: tuple[Layer, ...]

    def __post_init__(self) -> None:
        sizes = {part.token_bytes for part in self.parts}
        if len(sizes) != 1:
            raise ValueError(
                "parts: must be layers of one width and activation dtype, got tokens of "
                f"{sorted(sizes)} bytes"
            )

    @property
    def token_bytes(self) -> int:
        return self.parts[0].token_bytes

    def terms(
        self,
        which: Pass,
        tokens: float,
        *,
        touched: float | None = None,
        recipe: Recipe = DEFAULT_RECIPE,
    ) -> Terms:
        """As :meth:`Layer.terms`; ``touched`` is that of the only sparse part."""
        sparse = sum(isinstance(part, SparseLayer) for part in self.parts)
        if touched is not None and sparse != 1:
            raise ValueError(f"touched: needs one sparse layer among the parts, there are {sparse}")
        found: Terms = ()
        for part in self.parts:
            own = touched if isinstance(part, SparseLayer) else None
            found += part.terms(which, tokens, touched=own, recipe=recipe)
        return found + self._sum_terms(which, tokens)

    def _sum_terms(self, which: Pass, tokens: float) -> Terms:
        if which == "optimizer" or len(self.parts) == 1:
            return ()
        what, sum_ = ("grad_x of each", "grad_x") if which == "backward" else ("y of each", "y")
        return activations(
            tokens,
            [
                (what, len(self.parts) * self.token_bytes, 1, 0),
                (f"sum of {sum_}", self.token_bytes, 0, 1),
            ],
        )

    def pass_flops(self, which: Pass, tokens: float, recipe: Recipe = DEFAULT_RECIPE) -> float:
        return sum(part.pass_flops(which, tokens, recipe) for part in self.parts)

    def active_parameters(self) -> int:
        return sum(part.active_parameters() for part in self.parts)

    def total_parameters(self) -> int:
        return sum(part.total_parameters() for part in self.parts)


def _parts(layer: Layer) -> tuple[Layer, ...]:
    return layer.parts if isinstance(layer, Layers) else (layer,)
