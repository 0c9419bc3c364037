"""The byte model of memory layers: retrieval, the rows of the table, their gradients and step."""

from __future__ import annotations

from dataclasses import dataclass

from ultramem_cuda import UltraMemConfig

from .traffic_routing import Routing
from .traffic_terms import (
    DEFAULT_RECIPE,
    FLOAT32,
    INT64,
    Optimizer,
    Part,
    Pass,
    Recipe,
    SparseLayer,
    Term,
    Terms,
    activations,
    check_element_bytes,
    gradient_terms,
    of_operator,
    update_terms,
    weight_terms,
)

INT32 = 4
INT16 = 2
# Entries are sorted by slot, as pairs of 32-bit integers, by so many bits of the slot in a pass.
SORT_PAIR_BYTES = 8
SORT_BITS = 8
# Each operator's tensors of tokens: name, how often read and written.
Accesses = dict[str, list[tuple[str, int, int]]]
# The operators that read weights of another name.
WEIGHT_OPERATORS = {
    "query_proj": "tucker_query",
    "query_norm": "tucker_query",
    "cores and key_norm": "product_key_topk",
}


@dataclass(frozen=True)
class Table:
    """Rows of pre-values and values, as the tokens of the layers on it read and train them.

    An *entry* is a slot that a token retrieved. Factors of the gradient (``GradientFactors``) are,
    of an entry, its slot (4 bytes), C weights (4 each), with pre-values grad_a (4), with several
    groups its group (1); of a token, a copy of grad_out and of pre_input.
    """

    num_slots: int
    """N of the table: its sort's keys."""
    selected: int
    """S, entries of a token."""
    value_dim: int
    pre_value_dim: int = 0
    num_cores: int = 1
    num_groups: int = 1
    """E where out is [T, E, Dv], else 1."""
    parameter_bytes: int = 2
    activation_bytes: int = 2

    @property
    def dims(self) -> int:
        """Elements of a slot."""
        return self.pre_value_dim + self.value_dim

    @property
    def row_bytes(self) -> int:
        """Bytes of a slot: its pre-value and its value."""
        return self.dims * self.parameter_bytes

    @property
    def grad_a_bytes(self) -> int:
        """Of an entry."""
        return FLOAT32 if self.pre_value_dim else 0

    @property
    def factor_entry_bytes(self) -> int:
        """Of the factors of one entry, without the token's copies."""
        group = 1 if self.num_groups > 1 else 0
        return INT32 + FLOAT32 * self.num_cores + self.grad_a_bytes + group

    @property
    def factor_copies_bytes(self) -> int:
        """Of one token's copies of grad_out and pre_input."""
        width = self.num_groups * self.value_dim + self.pre_value_dim
        return width * self.activation_bytes

    def read(self, tokens: float, touched: float) -> Term:
        """The rows that tokens use: forward as backward."""
        gathered = tokens * self.selected * self.row_bytes
        distinct = touched * self.row_bytes
        return Term("rows", "rows", gathered, reads=1, distinct_nbytes=distinct)

    def factor_terms(self, tokens: float) -> Terms:
        """Deferred gradients: what the backward writes for the step."""
        return activations(
            tokens,
            [
                ("factors of entries", self.selected * self.factor_entry_bytes, 0, 1),
                ("factors of tokens", self.factor_copies_bytes, 0, 1),
            ],
        )

    def main_grad_terms(self, tokens: float, touched: float) -> Terms:
        """Gradients that the backward adds to a float32 gradient of the table's shape.

        It hands weights and grad_a of the entries on, sorts the entries, gathers grad_out and
        pre_input for each, and reads and writes each touched row of the gradient once.
        """
        entry = FLOAT32 * self.num_cores + self.grad_a_bytes
        gradient = touched * self.dims * FLOAT32
        return (
            *activations(tokens, [("weights of entries", self.selected * entry, 1, 1)]),
            self._sort(tokens * self.selected),
            self._gathered_copies(tokens, 1),
            Term("main_grad of rows", "rows", gradient, reads=1, writes=1),
        )

    def step_terms(self, entries: float, rows: float, recipe: Recipe) -> Terms:
        """A step from factors: entries are sorted, each of the touched ``rows`` is updated once.

        Entries and rows are those of all layers and micro-batches of the step. Clipping gathers the
        copies of tokens once more: the norm is that of whole rows, and must be known before the
        first one is changed.
        """
        tokens = entries / self.selected
        reads = 2 if recipe.clip else 1
        factors = [("factors of entries", self.selected * self.factor_entry_bytes, 1, 0)]
        return (
            *activations(tokens, factors),
            self._sort(entries),
            self._gathered_copies(tokens, reads),
            *self._update("rows", rows, recipe.table_optimizer),
        )

    def dense_step_terms(self, rows: float, recipe: Recipe) -> Terms:
        """A step from a float32 main_grad over ``rows`` rows, all there are, which zeroes it."""
        nbytes, reads = rows * self.dims * FLOAT32, 2 if recipe.clip else 1
        return (
            Term("main_grad", "weights", nbytes, reads=reads, writes=1),
            *self._update("weights", rows, recipe.table_optimizer),
        )

    def _update(self, part: Part, rows: float, optimizer: Optimizer) -> Terms:
        """Rows and what an optimizer keeps of them, each read and written once."""
        num_tables = 2 if self.pre_value_dim else 1
        states = rows * num_tables * optimizer.row_state_bytes
        return (
            *optimizer.terms("rows", part, rows * self.dims, self.parameter_bytes),
            Term("states of rows", part, states, reads=1, writes=1),
        )

    def _sort(self, entries: float) -> Term:
        passes = -(-self.num_slots.bit_length() // SORT_BITS)
        nbytes = entries * SORT_PAIR_BYTES
        return Term("sort of entries", "activations", nbytes, reads=passes, writes=passes)

    def _gathered_copies(self, tokens: float, reads: int) -> Term:
        """grad_out and pre_input, of which every entry wants its group's and its token's."""
        nbytes = tokens * self.selected * self.dims * self.activation_bytes
        distinct = min(nbytes, tokens * self.factor_copies_bytes)
        return Term(
            "grad_out, pre_input by entry", "rows", nbytes, reads=reads, distinct_nbytes=distinct
        )


@dataclass(frozen=True)
class MemoryLayer(SparseLayer):
    """One memory layer: query projection, keys, pre and value projections, rows of the table.

    Sizes are those of ``config``, whose ``window`` is what the layer can reach of the table. The
    step is that of one layer alone: layers that share rows touch fewer together than the sum.

    A term is what one operator does to a tensor; the tables have the sums of a pass.

    Activations, with P = 2*H*Q*Kd and S = H*M; elements of a token, bytes of an element (e: those
    of an activation, 4: float32 or int32, 8: int64, 2: int16), and how often each pass reads +
    writes the tensor:

    ================  ========  =====  =========  =======  ========
    tensor            elements  bytes  inference  forward  backward
    ================  ========  =====  =========  =======  ========
    x                 D         e      2+0        2+0      2+0
    pre_input         Dp        e      1+1        1+1      1+0
    projection        P         e      1+1        1+1      1+0
    query             P         e      1+1        1+1      1+0
    axis_indices      2*H*m     4      1+1        1+1      1+0
    axis_scores       2*H*R*m   4      1+1        1+1      1+0
    scores            S*C       4      1+1        1+1      1+0
    indices           S         8      1+1        1+1      1+0
    grid_positions    S         2                 0+1      1+0
    pre_activation    S         4                 0+1      1+0
    out               G*Dv      e      1+1        1+1      1+0
    y                 D         e      0+1        0+1
    grad_y            D         e                          2+0
    grad_out          G*Dv      e                          1+1
    grad_scores       S*C       4                          1+1
    grad_pre_input    Dp        e                          2+1
    grad_axis_scores  2*H*R*m   4                          2+1
    grad_query        P         e                          1+1
    grad_projection   P         e                          2+1
    grad_x            D         e                          1+2
    ================  ========  =====  =========  =======  ========

    G is 1, or E where groups are not summed. The scores of all n keys never reach memory, nor do
    retrieved rows. Without pre-values x is read once and grad_x 0+1, and pre_input, pre_activation
    and what belongs to them do not exist. With a softmax of the scores these are read and written
    once more, and so are their gradients. Gradients of the table: see :class:`Table`.

    Keys are normalised: once for all in inference, where they are read as they are kept; in
    training they are read, written normalised and read again, forward as (their gradients)
    backward.
    """

    config: UltraMemConfig
    parameter_bytes: int = 2
    activation_bytes: int = 2
    routing: Routing | None = None

    def __post_init__(self) -> None:
        check_element_bytes(
            self, parameter_bytes=self.parameter_bytes, activation_bytes=self.activation_bytes
        )
        self._check_routing()

    @property
    def token_bytes(self) -> int:
        return self.config.d_model * self.activation_bytes

    @property
    def population(self) -> int:
        return self.config.window

    @property
    def taken(self) -> int:
        return self.config.slots_per_token

    @property
    def table(self) -> Table:
        """The table that the layer reads."""
        c = self.config
        return Table(
            num_slots=c.num_slots,
            selected=c.slots_per_token,
            value_dim=c.value_dim,
            pre_value_dim=c.pre_value_dim,
            num_cores=c.num_cores,
            num_groups=c.output_groups,
            parameter_bytes=self.parameter_bytes,
            activation_bytes=self.activation_bytes,
        )

    @property
    def table_share(self) -> int:
        """Rows of the table over the layers that share it."""
        return self.config.num_slots // self.config.num_layers

    def terms(
        self,
        which: Pass,
        tokens: float,
        *,
        touched: float | None = None,
        recipe: Recipe = DEFAULT_RECIPE,
    ) -> Terms:
        rows = self._resolve(tokens, touched)
        return (
            *self._weight_terms(which, recipe),
            *self._key_terms(which, recipe),
            *self._table_terms(which, tokens, rows, recipe),
            *self._activations(which, tokens),
        )

    # ---- parameters ----------------------------------------------------------------------------

    @property
    def _query_dim(self) -> int:
        c = self.config
        return 2 * c.num_heads * c.num_queries * c.key_dim

    @property
    def _key_elements(self) -> int:
        c = self.config
        return 2 * c.num_heads * c.tucker_rank * c.num_keys * c.key_dim

    @property
    def _projections(self) -> dict[str, int]:
        """Elements of the matrices that every token is multiplied by."""
        c = self.config
        return {
            "query_proj": c.d_model * self._query_dim,
            "pre_proj": c.d_model * c.pre_value_dim,
            "value_proj": c.d_model * c.output_groups * c.value_dim,
        }

    def _weight_terms(self, which: Pass, recipe: Recipe) -> Terms:
        c = self.config
        sizes = {**self._projections, "query_norm": c.key_dim}
        sizes["cores and key_norm"] = (
            c.layer_parameters() - self._key_elements - sum(sizes.values())
        )
        found: Terms = ()
        for name, elements in sizes.items():
            if elements:
                terms = weight_terms(which, name, elements, self.parameter_bytes, recipe)
                operator = "" if which == "optimizer" else WEIGHT_OPERATORS.get(name, name)
                found += of_operator(operator, terms)
        return found

    def _key_terms(self, which: Pass, recipe: Recipe) -> Terms:
        elements = self._key_elements
        if which == "optimizer":
            return update_terms("keys", "keys", elements, self.parameter_bytes, recipe)
        nbytes = elements * self.activation_bytes

        def normalized(reads: int, writes: int) -> Term:
            return Term("normalized keys", "keys", nbytes, reads, writes)

        def grad(reads: int, writes: int) -> Term:
            return Term("grad of normalized keys", "keys", nbytes, reads, writes)

        keys = Term("keys", "keys", elements * self.parameter_bytes, reads=1)
        if which == "inference":
            return of_operator("product_key_topk", [normalized(1, 0)])
        if which == "forward":
            return (
                *of_operator("rms_norm", [keys, normalized(0, 1)]),
                *of_operator("product_key_topk", [normalized(1, 0)]),
            )
        gradient = gradient_terms("keys", "keys", elements, recipe)
        return (
            *of_operator("product_key_topk", [normalized(1, 0), grad(0, 1)]),
            *of_operator("rms_norm", [grad(1, 0), keys, *gradient]),
        )

    def _table_terms(self, which: Pass, tokens: float, rows: float, recipe: Recipe) -> Terms:
        deferred = recipe.table_gradient == "deferred"
        if which == "optimizer":
            if deferred:
                return self.table.step_terms(tokens * self.taken, rows, recipe)
            return self.table.dense_step_terms(self.table_share, recipe)
        read = self.table.read(tokens, rows)
        if which != "backward":
            return of_operator("value_ffn", [read])
        table = self.table
        gradient = table.factor_terms(tokens) if deferred else table.main_grad_terms(tokens, rows)
        return of_operator("value_ffn", [read, *gradient])

    # ---- activations ---------------------------------------------------------------------------

    def _activations(self, which: Pass, tokens: float) -> Terms:
        if which == "optimizer":
            return ()
        sizes = self._token_sizes
        if which == "inference":  # only a backward reads them
            sizes = {**sizes, "grid_positions": 0, "pre_activation": 0}
        accesses = self._backward_accesses() if which == "backward" else self._forward_accesses()
        found: Terms = ()
        for operator, tensors in accesses.items():
            table = [
                (name, sizes[name.removeprefix("grad_")], reads, writes)
                for name, reads, writes in tensors
            ]
            found += of_operator(operator, activations(tokens, table))
        return found

    @property
    def _token_sizes(self) -> dict[str, int]:
        """Bytes of a token of each tensor; gradients are as large as what they belong to."""
        c, e = self.config, self.activation_bytes
        query, axes = self._query_dim * e, 2 * c.num_heads * c.kept_per_axis
        scores = self.taken * c.num_cores * FLOAT32
        return {
            "x": self.token_bytes,
            "pre_input": c.pre_value_dim * e,
            "projection": query,
            "query": query,
            "axis_indices": axes * INT32,
            "axis_scores": axes * c.tucker_rank * FLOAT32,
            "scores": scores,
            "softmax": scores,
            "indices": self.taken * INT64,
            "grid_positions": self.taken * INT16,
            "pre_activation": self.taken * self.table.grad_a_bytes,
            "out": c.output_groups * c.value_dim * e,
            "y": self.token_bytes,
        }

    @property
    def _weights(self) -> str:
        """What slots are weighed with."""
        return "softmax" if self.config.score_norm == "softmax" else "scores"

    def _forward_accesses(self) -> Accesses:
        found: Accesses = {
            "tucker_query": [("x", 1, 0), ("projection", 1, 1), ("query", 0, 1)],
            "product_key_topk": [
                ("query", 1, 0),
                ("axis_indices", 1, 1),
                ("axis_scores", 1, 1),
                ("scores", 0, 1),
                ("indices", 0, 1),
                ("grid_positions", 0, 1),
            ],
            "value_ffn": [
                ("pre_input", 1, 0),
                ("indices", 1, 0),
                (self._weights, 1, 0),
                ("pre_activation", 0, 1),
                ("out", 0, 1),
            ],
            "value_proj": [("out", 1, 0), ("y", 0, 1)],
        }
        if self.config.pre_value_dim:
            found["pre_proj"] = [("x", 1, 0), ("pre_input", 0, 1)]
        if self._weights == "softmax":
            found["softmax"] = [("scores", 1, 0), ("softmax", 0, 1)]
        return found

    def _backward_accesses(self) -> Accesses:
        found: Accesses = {
            # Twice: for the gradients of out, and of value_proj.
            "value_proj": [("grad_y", 2, 0), ("out", 1, 0), ("grad_out", 0, 1)],
            "value_ffn": [
                ("grad_out", 1, 0),
                ("indices", 1, 0),
                (self._weights, 1, 0),
                ("pre_activation", 1, 0),
                ("pre_input", 1, 0),
                (f"grad_{self._weights}", 0, 1),
                ("grad_pre_input", 0, 1),
            ],
            "product_key_topk": [
                ("grad_scores", 1, 0),
                ("grid_positions", 1, 0),
                ("axis_indices", 1, 0),
                ("axis_scores", 1, 0),
                ("query", 1, 0),
                ("grad_axis_scores", 2, 1),  # of the query, and of the keys
                ("grad_query", 0, 1),
            ],
            "tucker_query": [
                ("grad_query", 1, 0),
                ("projection", 1, 0),
                ("grad_projection", 2, 1),
                ("x", 1, 0),
                ("grad_x", 0, 1),
            ],
        }
        if self.config.pre_value_dim:
            # Adds to what tucker_query gave.
            found["pre_proj"] = [("grad_pre_input", 2, 0), ("x", 1, 0), ("grad_x", 1, 1)]
        if self._weights == "softmax":
            found["softmax"] = [("softmax", 1, 0), ("grad_softmax", 1, 0), ("grad_scores", 0, 1)]
        return found

    # ---- FLOPs and parameters ------------------------------------------------------------------

    def pass_flops(self, which: Pass, tokens: float, recipe: Recipe = DEFAULT_RECIPE) -> float:
        """As :meth:`Layer.pass_flops`.

        Forward every key is scored; backward only the m kept ones of a side have a gradient, which
        goes to the query and to the key. Sums of gradients of rows, a multiply-add for each element
        of each entry, belong to the pass that makes them: the step where they are deferred.
        """
        c = self.config
        projections = 2 * sum(self._projections.values())
        rows = 2 * self.taken * self.table.dims
        sums_in: Pass = "optimizer" if recipe.table_gradient == "deferred" else "backward"
        sums = rows if which == sums_in else 0
        if which == "optimizer":
            return tokens * sums * (2 if recipe.clip else 1)
        if which == "backward":
            kept = 2 * 2 * c.num_heads * c.tucker_rank * c.kept_per_axis * c.key_dim
            return tokens * (2 * projections + 2 * kept + rows + sums)
        return tokens * (projections + 2 * self._key_elements + rows)

    def active_parameters(self) -> int:
        return self.config.active_parameters()

    def total_parameters(self) -> int:
        return self.config.layer_parameters() + self.table_share * self.table.dims


@dataclass(frozen=True)
class PKMLayer(MemoryLayer):
    """Product-key memory (arXiv 1907.05242): scores are row + column, slots are plain values.

    Raises:
        ValueError: a configuration with Tucker cores or pre-values.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config.mode != "additive" or self.config.pre_value_dim:
            raise ValueError(
                "config: must have mode 'additive' and no pre-values for a PKM layer, got "
                f"{self.config.mode!r}, pre_value_dim = {self.config.pre_value_dim}"
            )
