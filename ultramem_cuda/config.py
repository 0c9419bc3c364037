"""Configuration of memory layers and of the table they share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from .topology import Topology, check_window, layer_window, shared_num_keys

Mode = Literal["tucker", "additive"]
Activation = Literal["identity", "gelu", "relu", "silu"]
Shuffle = Literal["feistel", "permutation", "none"]
Init = Literal["release", "paper"]
ScoreNorm = Literal["none", "softmax"]
KeyBalanceNormalize = Literal["paper", "release"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "mode": get_args(Mode),
    "activation": get_args(Activation),
    "topology": get_args(Topology),
    "shuffle": get_args(Shuffle),
    "init": get_args(Init),
    "score_norm": get_args(ScoreNorm),
    "key_balance_normalize": get_args(KeyBalanceNormalize),
}

# Limits of the kernels: candidates are merged in shared memory, cores are held in registers.
MAX_AXIS_TOPK = 128
MAX_TOPK = 1024
MAX_RANK = 4
MAX_CORES = 4

# The layer's shuffle seed is config seed * 2^16 + layer index, below 2^63.
_MAX_LAYERS = 1 << 16
_MAX_SEED = 1 << 47


@dataclasses.dataclass(frozen=True, kw_only=True)
class UltraMemConfig:
    """One memory layer a transformer block, all on one table; immutable.

    Args:
        d_model: hidden size, D.
        num_layers: memory layers of the model (one a block), L.
        num_keys: keys per side that a layer sees, n. A layer has n*n virtual slots.
        key_dim: width of one key, Kd.
        num_slots: rows of the table, N.
        value_dim: width of a value row, Dv. ``num_cores`` divides it.
        pre_value_dim: width of a pre-value row, Dp; 0 (or None) for plain values.
        num_heads: H.
        tucker_rank: R, 1 to 4; 1 in additive mode.
        num_cores: Tucker cores, C, 1 to 4; 1 in additive mode.
        topk: slots kept for a token and head, M, at most 1024.
        axis_topk: keys kept per axis, m, at most 128; None for min(n, topk, 128). m*m >= M.
        query_per_rank: True where every Tucker rank has a query of its own (Q = R, as in the
            paper), False where they share one.
        activation: of the inner product with the pre-value: identity (V2), gelu (erf), relu or
            silu.
        key_expand: square root of the virtual copies of the window, so E = key_expand^2 (implicit
            value expansion).
        sum_groups: True to sum the E groups before one output projection (V2), False for a
            projection of all of them (V1).
        topology: which rows a layer sees: ring, noring, block or private.
        shuffle: how product keys are spread over rows: "feistel" (computed), "permutation" (an
            explicit random one, kept as a buffer, as the release has it) or "none".
        mode: "tucker", or "additive" for product keys whose score is row + column (PKM, PEER,
            Memory+).
        score_norm: "none" for raw scores (V2), "softmax" over the kept scores of a head (PKM).
        init: "release" or "paper"; see :mod:`ultramem_cuda.init`.
        ffn_inner_dim: inner width of the block's FFN after gating; only ``init="paper"`` needs it.
        eps: of the RMS norms of queries and keys.
        tucker_penalty: weight alpha of the Tucker penalty (UltraMem, section 3.3); 0 turns it off.
        tucker_margin: its threshold tau.
        key_balance: weight of the key balance loss (UltraMemV2, eq. 18-20); 0 turns it off.
        key_balance_normalize: selection counts are divided by T ("paper", eq. 20) or by T*H*m
            ("release").
        seed: of the shuffles.

    Raises:
        TypeError, ValueError: on construction, naming the field, what it was and what it must be.
    """

    d_model: int
    num_layers: int
    num_keys: int
    key_dim: int
    num_slots: int
    value_dim: int
    pre_value_dim: int = 0
    num_heads: int = 1
    tucker_rank: int = 2
    num_cores: int = 2
    topk: int = 32
    axis_topk: int | None = None
    query_per_rank: bool = True
    activation: Activation = "identity"
    key_expand: int = 1
    sum_groups: bool = True
    topology: Topology = "ring"
    shuffle: Shuffle = "feistel"
    mode: Mode = "tucker"
    score_norm: ScoreNorm = "none"
    init: Init = "release"
    ffn_inner_dim: int | None = None
    eps: float = 1e-6
    tucker_penalty: float = 0.0
    tucker_margin: float = 0.15
    key_balance: float = 0.0
    key_balance_normalize: KeyBalanceNormalize = "paper"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pre_value_dim is None:
            object.__setattr__(self, "pre_value_dim", 0)
        self._check_integers()
        for name in ("eps", "tucker_penalty", "tucker_margin", "key_balance"):
            self._check_real(name)
        for name in ("query_per_rank", "sum_groups"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: must be a bool, got {getattr(self, name)!r}")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}: must be one of {', '.join(choices)}, got {value!r}")
        self._check_mode()
        self._check_topk()
        self._check_values()
        check_window(self.topology, self.num_layers, self.num_slots, self.window)

    def _check_integers(self) -> None:
        bounds: dict[str, tuple[int, int | None]] = {
            "d_model": (1, None),
            "num_layers": (1, _MAX_LAYERS),
            "num_keys": (1, (1 << 31) - 1),
            "key_dim": (1, None),
            "num_slots": (1, (1 << 62)),
            "value_dim": (1, None),
            "pre_value_dim": (0, None),
            "num_heads": (1, None),
            "tucker_rank": (1, MAX_RANK),
            "num_cores": (1, MAX_CORES),
            "topk": (1, MAX_TOPK),
            "axis_topk": (1, MAX_AXIS_TOPK),
            "key_expand": (1, None),
            "ffn_inner_dim": (1, None),
            "seed": (0, _MAX_SEED - 1),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is None and name in ("axis_topk", "ffn_inner_dim"):
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: must be an int, got {value!r}")
            if value < low or (high is not None and value > high):
                wanted = f"at least {low}" if high is None else f"in [{low}, {high}]"
                raise ValueError(f"{name}: must be {wanted}, got {value}")

    def _check_real(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}: must be a number, got {value!r}")
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"{name}: must be finite and not negative, got {value}")

    def _check_mode(self) -> None:
        if self.mode == "additive":
            for name in ("tucker_rank", "num_cores"):
                if getattr(self, name) != 1:
                    raise ValueError(
                        f"{name}: must be 1 in additive mode, which has no core, "
                        f"got {getattr(self, name)}"
                    )
            if self.tucker_penalty:
                raise ValueError(
                    f"tucker_penalty: must be 0 in additive mode, which has no core, "
                    f"got {self.tucker_penalty}"
                )
        if self.score_norm == "softmax" and self.num_cores != 1:
            raise ValueError(
                f"score_norm: must be 'none' with more than one core, got 'softmax' with "
                f"num_cores = {self.num_cores}"
            )
        if self.init == "paper" and self.ffn_inner_dim is None:
            raise ValueError(
                "ffn_inner_dim: must be given with init='paper', which matches the FFN's output, "
                "got None"
            )
        if self.init == "paper" and self.score_norm != "none":
            raise ValueError(
                f"score_norm: must be 'none' with init='paper', which is derived for raw scores, "
                f"got {self.score_norm!r}"
            )

    def _check_topk(self) -> None:
        n, kept = self.num_keys, self.kept_per_axis
        if kept > n:
            raise ValueError(f"axis_topk: must be at most num_keys = {n}, got {kept}")
        if self.topk > kept * kept:
            raise ValueError(
                f"topk: must be at most axis_topk^2 = {kept * kept} (axis_topk = {kept}), "
                f"got {self.topk}"
            )
        if self.mode == "additive" and min(self.topk, n) > MAX_AXIS_TOPK:
            raise ValueError(
                f"topk: must be at most {MAX_AXIS_TOPK} in additive mode with num_keys = {n}, "
                f"got {self.topk}"
            )
        if self.mode == "additive" and kept < min(self.topk, n):
            raise ValueError(
                f"axis_topk: must be at least min(topk, num_keys) = {min(self.topk, n)} in "
                f"additive mode, got {kept}"
            )

    def _check_values(self) -> None:
        if self.value_dim % self.num_cores:
            raise ValueError(
                f"value_dim: must be a multiple of num_cores = {self.num_cores}, "
                f"got {self.value_dim}"
            )
        if self.num_keys % self.key_expand:
            raise ValueError(
                f"num_keys: must be a multiple of key_expand = {self.key_expand}, "
                f"got {self.num_keys}"
            )
        if self.activation != "identity" and not self.pre_value_dim:
            raise ValueError(
                f"activation: must be 'identity' without pre-values, to which alone it applies, "
                f"got {self.activation!r}"
            )

    @property
    def kept_per_axis(self) -> int:
        """m: ``axis_topk``, or its default."""
        if self.axis_topk is not None:
            return self.axis_topk
        return min(self.num_keys, self.topk, MAX_AXIS_TOPK)

    @property
    def num_queries(self) -> int:
        """Q: queries a side and head."""
        return self.tucker_rank if self.query_per_rank else 1

    @property
    def expand(self) -> int:
        """E: virtual copies of the window."""
        return self.key_expand**2

    @property
    def window(self) -> int:
        """Rows of the table that one layer sees, n*n / E."""
        return self.num_keys**2 // self.expand

    @property
    def slots_per_token(self) -> int:
        """S: slots a token reads in one layer, H*M."""
        return self.num_heads * self.topk

    @property
    def output_groups(self) -> int:
        """Groups that reach the output projection: 1 where they are summed, else E."""
        return 1 if self.sum_groups else self.expand

    def layer_window(self, layer_index: int) -> tuple[int, int]:
        """(window, offset) of a layer in rows of the table."""
        return layer_window(
            self.topology,
            layer_index,
            num_layers=self.num_layers,
            num_slots=self.num_slots,
            window=self.window,
        )

    def layer_parameters(self) -> int:
        """Parameters of one layer, without the table."""
        query = 2 * self.num_heads * self.num_queries * self.key_dim * self.d_model
        keys = 2 * self.num_heads * self.tucker_rank * self.num_keys * self.key_dim
        cores = (
            self.num_cores * self.num_heads * self.tucker_rank**2 if self.mode == "tucker" else 0
        )
        pre = self.pre_value_dim * self.d_model
        value = self.value_dim * self.output_groups * self.d_model
        return query + keys + cores + pre + value + 2 * self.key_dim

    def table_parameters(self) -> int:
        """Parameters of the table, shared by all layers."""
        return self.num_slots * (self.pre_value_dim + self.value_dim)

    def active_parameters(self) -> int:
        """Parameters that one token uses in one layer: all of the layer's, and the rows it
        reads."""
        rows = self.slots_per_token * (self.pre_value_dim + self.value_dim)
        return self.layer_parameters() + rows

    def total_parameters(self) -> int:
        """Parameters of all memory layers and the table."""
        return self.num_layers * self.layer_parameters() + self.table_parameters()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; :meth:`from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> UltraMemConfig:
        """A configuration from :meth:`to_dict`'s output; unknown fields raise ValueError."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ValueError(f"{unknown[0]}: is not a field of UltraMemConfig")
        return cls(**data)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> UltraMemConfig:
        """A published or comparable size: "227M-1.2B", "1B-7B", "2.5B-60B" or "2.5B-120B".

        Args:
            name: active and total parameters of the whole model.
            overrides: fields to change.
        """
        if name not in _PRESETS:
            raise ValueError(f"name: must be one of {', '.join(_PRESETS)}, got {name!r}")
        return cls.from_dict({**_PRESETS[name], **overrides})


# "P2" is UltraMemV2 (arXiv 2508.18756). R = C = 2, one head, queries per rank and identity
# activation are P2's everywhere, and the dataclass's defaults.
_PRESETS: dict[str, dict[str, Any]] = {
    "227M-1.2B": {
        "d_model": 768,  # P2 table 10
        "num_layers": 20,  # P2 table 10
        "num_keys": shared_num_keys(360, 20, 0.5),  # P2 table 10: 360 keys, share ratio 0.5 -> 1138
        "num_slots": 20 * 360**2,  # P2 table 10: every layer brings 360^2 rows
        "key_dim": 192,  # P2 table 10
        "topk": 32,  # P2 table 10
        "axis_topk": 32,  # the release keeps as many per axis as in the end
        "pre_value_dim": 192,  # P2 table 10
        "value_dim": 192,  # P2 table 10
        "ffn_inner_dim": 2496,  # P2 table 10, after gating
    },
    "1B-7B": {
        "d_model": 2048,  # P2 table 10
        "num_layers": 16,  # 16 * 528^2 rows of 1152 are 5.1B parameters
        "num_keys": shared_num_keys(528, 16, 0.25),  # P2 table 10: 528; four tables shared: assumed
        "num_slots": 16 * 528**2,  # P2 table 10: every layer brings 528^2 rows
        "key_dim": 512,  # P2 table 10
        "topk": 128,  # P2 table 10
        "axis_topk": 128,  # the release keeps as many per axis as in the end
        "pre_value_dim": 384,  # P2 table 10
        "value_dim": 768,  # P2 table 10
        "ffn_inner_dim": 5632,  # ours: the dense FFN that the benchmarks place beside this layer
    },
    "2.5B-60B": {
        # P2 publishes no shapes for the 2.5B models: all but topk is ours.
        "d_model": 2560,
        "num_layers": 24,
        "num_keys": shared_num_keys(1364, 24, 2 / 24),  # 1928: windows of two layers' rows
        "num_slots": 24 * 1364**2,  # 44.7M rows of 1280 are 57B parameters
        "key_dim": 640,  # d_model / 4, as in P2's table 10
        "topk": 768,  # P2's 60B model is its top-768 one
        "axis_topk": 128,
        "pre_value_dim": 320,  # d_model / 8
        "value_dim": 960,  # 3/8 of d_model, as in P2's 1B-7B
        "ffn_inner_dim": 8064,  # makes 2.5B active parameters with plain attention
    },
    "2.5B-120B": {
        # As 2.5B-60B with twice the rows and fewer of them read.
        "d_model": 2560,
        "num_layers": 24,
        "num_keys": shared_num_keys(1929, 24, 2 / 24),  # 2728: windows of two layers' rows
        "num_slots": 24 * 1929**2,  # 89.3M rows of 1280 are 114B parameters
        "key_dim": 640,
        "topk": 256,  # ours; a number of values that P2 uses at other sizes
        "axis_topk": 128,
        "pre_value_dim": 320,
        "value_dim": 960,
        "ffn_inner_dim": 8064,
    },
}
