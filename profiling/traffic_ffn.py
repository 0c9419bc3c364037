"""The byte model of feed-forward layers: a dense SwiGLU and a top-k mixture of them.

Tables of activations: elements of a token, bytes of an element (e: those of an activation, 4:
float32, 8: int64), and how often each pass reads + writes the tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from .traffic_routing import Routing
from .traffic_terms import (
    DEFAULT_RECIPE,
    FLOAT32,
    INT64,
    Layer,
    Pass,
    Recipe,
    SparseLayer,
    Term,
    Terms,
    activations,
    check_element_bytes,
    check_sizes,
    gradient_terms,
    update_terms,
    weight_terms,
)


@dataclass(frozen=True)
class DenseFFN(Layer):
    """A SwiGLU, down(silu(gate x) * up x): three matrices of ``d_model * inner``.

    Gate and up are one product, [T, D] by [D, 2I].

    ============  ========  =====  =========  =======  ========
    tensor        elements  bytes  inference  forward  backward
    ============  ========  =====  =========  =======  ========
    x             D         e      1+0        1+0      1+0
    gate_up       2*I       e      1+1        1+1      1+0
    product       I         e      1+1        1+1      1+0
    y             D         e      0+1        0+1
    grad_y        D         e                          2+0
    grad_product  I         e                          1+1
    grad_gate_up  2*I       e                          2+1
    grad_x        D         e                          0+1
    ============  ========  =====  =========  =======  ========
    """

    d_model: int
    inner: int
    """I; 0 for no layer at all."""
    parameter_bytes: int = 2
    activation_bytes: int = 2

    def __post_init__(self) -> None:
        check_sizes(self, d_model=self.d_model)
        if self.inner != 0:
            check_sizes(self, inner=self.inner)
        check_element_bytes(
            self, parameter_bytes=self.parameter_bytes, activation_bytes=self.activation_bytes
        )

    @property
    def token_bytes(self) -> int:
        return self.d_model * self.activation_bytes

    def terms(
        self,
        which: Pass,
        tokens: float,
        *,
        touched: float | None = None,
        recipe: Recipe = DEFAULT_RECIPE,
    ) -> Terms:
        """As :meth:`Layer.terms`; nothing here can be touched in part."""
        if touched is not None:
            raise ValueError("touched: a dense FFN has no members to count")
        matrix = self.d_model * self.inner
        return (
            *weight_terms(which, "gate_up", 2 * matrix, self.parameter_bytes, recipe),
            *weight_terms(which, "down", matrix, self.parameter_bytes, recipe),
            *self._activations(which, tokens),
        )

    def _activations(self, which: Pass, tokens: float) -> Terms:
        x = self.token_bytes if self.inner else 0
        inner = self.inner * self.activation_bytes
        if which == "optimizer":
            return ()
        if which == "backward":
            return activations(
                tokens,
                [
                    ("grad_y", x, 2, 0),  # of product, and of down
                    ("product", inner, 1, 0),
                    ("grad_product", inner, 1, 1),
                    ("gate_up", 2 * inner, 1, 0),
                    ("grad_gate_up", 2 * inner, 2, 1),  # of x, and of the weight
                    ("x", x, 1, 0),
                    ("grad_x", x, 0, 1),
                ],
            )
        return activations(
            tokens,
            [
                ("x", x, 1, 0),
                ("gate_up", 2 * inner, 1, 1),
                ("product", inner, 1, 1),
                ("y", x, 0, 1),
            ],
        )

    def pass_flops(self, which: Pass, tokens: float, recipe: Recipe = DEFAULT_RECIPE) -> float:
        forward = 2 * 3 * self.d_model * self.inner * tokens
        return {"optimizer": 0.0, "backward": 2 * forward}.get(which, forward)

    def active_parameters(self) -> int:
        return 3 * self.d_model * self.inner

    def total_parameters(self) -> int:
        return self.active_parameters()


@dataclass(frozen=True)
class MoEFFN(SparseLayer):
    """A router and ``num_experts`` SwiGLU experts, of which a token uses ``experts_per_token``.

    Dropless dispatch: rows of x are gathered in the order of their experts, the experts' products
    are grouped, and what they give is summed by token with the gates as weights. A touched expert
    is read once however many tokens use it: ``gathered`` equals ``distinct``. The gradients of all
    experts are written, those of untouched ones as zeros, unless gradients are accumulated.

    =============  ========  =====  =========  =======  ========
    tensor         elements  bytes  inference  forward  backward
    =============  ========  =====  =========  =======  ========
    x              D         e      2+0        2+0      1+0
    logits         X         4      1+1        1+1
    probabilities  X         4                 0+1      1+0
    gates          k         4      1+1        1+1      1+0
    chosen         k         8      1+1        1+1      1+0
    order          k         8      2+1        2+1      2+0
    gathered       k*D       e      1+1        1+1      1+0
    gate_up        2*k*I     e      1+1        1+1      1+0
    product        k*I       e      1+1        1+1      1+0
    outputs        k*D       e      1+1        1+1      1+0
    y              D         e      0+1        0+1
    grad_y         D         e                          1+0
    grad_outputs   k*D       e                          2+1
    grad_gates     k         4                          1+1
    grad_product   k*I       e                          1+1
    grad_gate_up   2*k*I     e                          2+1
    grad_gathered  k*D       e                          1+1
    grad_logits    X         4                          2+1
    grad_x         D         e                          1+2
    =============  ========  =====  =========  =======  ========

    x is read by the router and by the gather, as if that found the k copies of a token in a cache;
    for thousands of tokens it does not find all (docs/profiling.md, "Where the three differ").
    ``order`` is the sort's result, its passes over a few integers a token are not counted. grad_x
    comes from the experts, and the router's product adds to it.
    """

    d_model: int
    inner: int
    num_experts: int
    experts_per_token: int
    parameter_bytes: int = 2
    activation_bytes: int = 2
    routing: Routing | None = None

    def __post_init__(self) -> None:
        check_sizes(
            self,
            d_model=self.d_model,
            inner=self.inner,
            num_experts=self.num_experts,
            experts_per_token=self.experts_per_token,
        )
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"MoEFFN: experts_per_token must be at most num_experts = {self.num_experts}, "
                f"got {self.experts_per_token}"
            )
        check_element_bytes(
            self, parameter_bytes=self.parameter_bytes, activation_bytes=self.activation_bytes
        )
        self._check_routing()

    @property
    def token_bytes(self) -> int:
        return self.d_model * self.activation_bytes

    @property
    def population(self) -> int:
        return self.num_experts

    @property
    def taken(self) -> int:
        return self.experts_per_token

    @property
    def expert_parameters(self) -> int:
        """Of one expert."""
        return 3 * self.d_model * self.inner

    @property
    def router_parameters(self) -> int:
        return self.d_model * self.num_experts

    def terms(
        self,
        which: Pass,
        tokens: float,
        *,
        touched: float | None = None,
        recipe: Recipe = DEFAULT_RECIPE,
    ) -> Terms:
        router = weight_terms(which, "router", self.router_parameters, self.parameter_bytes, recipe)
        experts = self._expert_terms(which, self._resolve(tokens, touched), recipe)
        return (*router, *experts, *self._activations(which, tokens))

    def _expert_terms(self, which: Pass, touched: float, recipe: Recipe) -> Terms:
        everything = self.num_experts * self.expert_parameters
        if which == "optimizer":
            return update_terms("experts", "weights", everything, self.parameter_bytes, recipe)
        used = touched * self.expert_parameters
        read = Term("experts", "rows", used * self.parameter_bytes, reads=1)
        if which != "backward":
            return (read,)
        if recipe.accumulate:
            return (read, *gradient_terms("experts", "rows", used, recipe))
        return (read, *gradient_terms("experts", "weights", everything, recipe))

    def _activations(self, which: Pass, tokens: float) -> Terms:
        k, x = self.experts_per_token, self.token_bytes
        rows, inner = k * x, k * self.inner * self.activation_bytes
        logits = self.num_experts * FLOAT32
        if which == "optimizer":
            return ()
        if which == "backward":
            return activations(
                tokens,
                [
                    ("grad_y", x, 1, 0),
                    ("outputs", rows, 1, 0),
                    ("gates", k * FLOAT32, 1, 0),
                    ("order", k * INT64, 2, 0),  # gather grad_y, scatter grad_gathered
                    ("grad_outputs", rows, 2, 1),
                    ("grad_gates", k * FLOAT32, 1, 1),
                    ("product", inner, 1, 0),
                    ("grad_product", inner, 1, 1),
                    ("gate_up", 2 * inner, 1, 0),
                    ("grad_gate_up", 2 * inner, 2, 1),
                    ("gathered", rows, 1, 0),
                    ("grad_gathered", rows, 1, 1),
                    ("chosen", k * INT64, 1, 0),
                    ("probabilities", logits, 1, 0),
                    ("grad_logits", logits, 2, 1),
                    ("x", x, 1, 0),
                    ("grad_x", x, 1, 2),
                ],
            )
        saved = [("probabilities", logits, 0, 1)] if which == "forward" else []
        return activations(
            tokens,
            [
                ("x", x, 2, 0),
                ("logits", logits, 1, 1),
                *saved,
                ("gates", k * FLOAT32, 1, 1),
                ("chosen", k * INT64, 1, 1),
                ("order", k * INT64, 2, 1),
                ("gathered", rows, 1, 1),
                ("gate_up", 2 * inner, 1, 1),
                ("product", inner, 1, 1),
                ("outputs", rows, 1, 1),
                ("y", x, 0, 1),
            ],
        )

    def pass_flops(self, which: Pass, tokens: float, recipe: Recipe = DEFAULT_RECIPE) -> float:
        forward = 2 * self.active_parameters() * tokens
        return {"optimizer": 0.0, "backward": 2 * forward}.get(which, forward)

    def active_parameters(self) -> int:
        return self.router_parameters + self.experts_per_token * self.expert_parameters

    def total_parameters(self) -> int:
        return self.router_parameters + self.num_experts * self.expert_parameters
