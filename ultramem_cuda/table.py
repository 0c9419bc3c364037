"""The value table: one pair of parameters that all memory layers of a model share."""

from __future__ import annotations

import collections
import math
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ._local import is_dtensor, local
from .config import UltraMemConfig
from .factors import GradientFactors
from .init import table_std

if TYPE_CHECKING:
    from .parallel import TableSharding

_PARAMETER_ATTRIBUTE = "_ultramem_table"
# Rows that are scaled in float64 at once.
_ROWS_AT_ONCE = 1 << 16

# Those of this package, whose states may hold copies of a table's parameters.
live_optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


class _TableReference:
    """What a parameter knows its table by. In a pickle it is an empty OrderedDict, which
    ``torch.load(weights_only=True)`` takes: the table sets it anew."""

    def __init__(self, table: MemoryTable) -> None:
        self.table = weakref.ref(table)

    def __reduce__(self) -> tuple[Any, ...]:
        return collections.OrderedDict, ()


def table_of(parameter: Tensor) -> MemoryTable | None:
    """The table that a parameter belongs to, or None."""
    reference = getattr(parameter, _PARAMETER_ATTRIBUTE, None)
    return reference.table() if isinstance(reference, _TableReference) else None


@torch.no_grad()
def write_scaled(to: Tensor, rows: Tensor, scale: Tensor) -> None:
    """to = rows * scale, rounded once from float64, of which there is never a whole table."""
    to, rows = local(to), local(rows)
    scale = scale.to(rows.device, torch.float64)
    for out, part in zip(to.split(_ROWS_AT_ONCE), rows.split(_ROWS_AT_ONCE), strict=True):
        out.copy_(part.double() * scale)


class _ForeignOptimizers:
    """Keeps optimizers that know nothing of factors from passing over deferred tables, whose
    ``.grad`` is None."""

    def __init__(self) -> None:
        self._watched = False

    def watch(self) -> None:
        if not self._watched:
            register_optimizer_step_pre_hook(self._before_step)
            self._watched = True

    @staticmethod
    def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if getattr(optimizer, "handles_deferred", False):
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                table = table_of(parameter) if parameter.requires_grad else None
                if table is not None and table.factors is not None:
                    raise RuntimeError(
                        f"{type(optimizer).__name__} would skip the parameters of a MemoryTable "
                        "with grad_mode='deferred', whose gradients are not in .grad: use "
                        "ultramem_cuda.optim.MemoryAdam, MemoryAdagrad or MemorySGD for them, "
                        "leave them out (their factors: table.factors), freeze the table, or use "
                        "grad_mode='dense'"
                    )


_foreign_optimizers = _ForeignOptimizers()


class MemoryTable(nn.Module):
    """Rows (pre-value, value), the slots that memory layers read: each an FFN of inner width 1
    (PEER).

    Hold it in one module of the model and pass it to the layers' ``forward``; so it appears once in
    the state dict.

    Attributes:
        values: parameter [num_slots, value_dim].
        pre_values: parameter [num_slots, pre_value_dim], or None without pre-values.
        scale: with ``grad_mode="deferred"`` a buffer, float64 [2], else None. The layers take
            ``values * scale[0]`` and ``pre_values * scale[1]``: these products, the effective
            weights, are what is trained. Weight decay is a step's multiplication of the scale,
            exact for every row whether read or not; it is one until there is some, and steps keep
            it between 2^-8 and 1, so that effective weights of float16 tables must stay below 255.
            Whoever reads, writes or averages the parameters themselves, or steps them with an
            optimizer of their own, must heed it; see :meth:`fold_scale`.
        factors: a :class:`~ultramem_cuda.factors.GradientFactors` with ``grad_mode="deferred"``,
            else None. Its gradients are those of the effective weights; where the table is sharded,
            of this rank's part, summed over the memory group.
        sharding: a :class:`~ultramem_cuda.parallel.TableSharding` after
            ``parallel.shard_table`` or ``parallel.replicate_table``, else None. The parameters of a
            sharded table are DTensors; num_slots, value_dim and pre_value_dim are those of all of
            it.

    Args:
        num_slots: rows, N; N times the width may pass 2^31.
        value_dim: Dv.
        pre_value_dim: Dp; 0 or None for plain values.
        dtype: of both parameters, any that ``ops.value_ffn`` takes.
        grad_mode: "dense", ordinary gradients (accumulated in ``param.main_grad`` where that
            exists); or "deferred": ``.grad`` stays None and no gradient as large as the table ever
            exists, the backward appends its factors to ``factors`` instead, until
            :meth:`zero_grad`, ``factors.clear()`` or the ``zero_grad()`` of an optimizer of
            ``ultramem_cuda.optim``, which apply them. One that does not know of them (class
            attribute ``handles_deferred``) raises when it is to step such a table;
            ``torch.nn.utils.clip_grad_norm_`` does not see them, ``optim.clip_grad_norm_`` does.
            In a job of several processes those optimizers refuse to step a table that
            ``ultramem_cuda.parallel`` has neither sharded nor replicated.
        init_std: standard deviation of the normal initialisation of both parameters.

    ``zero_grad()`` of a module that holds the table sets ``.grad`` itself and does not call the
    table's: clear the factors where the step is made. Factors are no part of the state dict; a
    copy, a pickle and a table moved to another device or dtype have none.

    The scale is part of the state dict and stays float64 when the table is moved to another dtype.
    Either kind of table loads the state dict of the other: a dense one the effective weights, a
    deferred one takes all the weights without a scale for those of a scale of one. Parts of a state
    dict, loaded one after the other (``strict=False``), must bring the scale with the last of the
    weights or after them. Some of the weights alone leave the scale as it is, and it is reported as
    missing; a scale that comes with some of the weights leaves the entry of those that never came.
    A dense table needs weights and scale together: a scale without all of them is reported as
    unexpected.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """

    values: nn.Parameter
    pre_values: nn.Parameter | None
    scale: Tensor | None
    factors: GradientFactors | None
    sharding: TableSharding | None

    def __init__(
        self,
        num_slots: int,
        value_dim: int,
        pre_value_dim: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        grad_mode: str = "dense",
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        for name, value, low in (
            ("num_slots", num_slots, 1),
            ("value_dim", value_dim, 1),
            ("pre_value_dim", 0 if pre_value_dim is None else pre_value_dim, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int):
                wanted = "an int or None" if name == "pre_value_dim" else "an int"
                raise TypeError(f"{name}: must be {wanted}, got {value!r}")
            if value < low:
                raise ValueError(f"{name}: must be at least {low}, got {value}")
        if isinstance(init_std, bool) or not isinstance(init_std, int | float):
            raise TypeError(f"init_std: must be a number, got {init_std!r}")
        if not (math.isfinite(init_std) and init_std >= 0.0):
            raise ValueError(f"init_std: must be finite and not negative, got {init_std}")
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype: must be a torch.dtype or None, got {dtype!r}")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype: must be a floating-point type, got {dtype}")
        if grad_mode not in ("dense", "deferred"):
            raise ValueError(f"grad_mode: must be 'dense' or 'deferred', got {grad_mode!r}")
        self.num_slots = num_slots
        self.value_dim = value_dim
        self.pre_value_dim = pre_value_dim or 0
        self.grad_mode = grad_mode
        self.init_std = init_std
        self.sharding = None
        self.values = nn.Parameter(torch.empty(num_slots, value_dim, dtype=dtype, device=device))
        if self.pre_value_dim:
            pre_values = torch.empty(num_slots, self.pre_value_dim, dtype=dtype, device=device)
            self.pre_values = nn.Parameter(pre_values)
        else:
            self.register_parameter("pre_values", None)
        self._config: UltraMemConfig | None = None
        # Which of the two weights were loaded without the scale that is still to come.
        self._awaits_scale = [False, False]
        self._register_scale()
        self.factors = None
        if grad_mode == "deferred":
            self.factors = self._new_factors()
            _foreign_optimizers.watch()
        self.reset_parameters()

    @classmethod
    def from_config(
        cls,
        config: UltraMemConfig,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        grad_mode: str = "dense",
    ) -> MemoryTable:
        """The table of ``config``, initialised as ``config.init`` says."""
        table = cls(
            config.num_slots,
            config.value_dim,
            config.pre_value_dim,
            dtype=dtype,
            device=device,
            grad_mode=grad_mode,
            init_std=table_std(config),
        )
        table._config = config
        return table

    def _new_factors(self) -> GradientFactors:
        """For the rows and columns that are here."""
        values = local(self.values)
        pre_values = None if self.pre_values is None else local(self.pre_values)
        return GradientFactors(
            values.shape[0],
            values.shape[1],
            0 if pre_values is None else pre_values.shape[1],
            dtype=values.dtype,
            device=values.device,
        )

    def _set_sharding(self, sharding: TableSharding) -> None:
        """The parameters are this rank's part by now."""
        self.sharding = sharding
        if self.grad_mode == "deferred":
            self.factors = self._new_factors()

    def _register_scale(self) -> None:
        scale = None
        if self.grad_mode == "deferred":
            scale = torch.ones(2, dtype=torch.float64, device=self.values.device)
        self.register_buffer("scale", scale)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both parameters from N(0, init_std^2) with torch's default generator.

        Each rank of a sharded table draws its part, seeded by the generator of the mesh's first.
        """
        generator: torch.Generator | None = None
        if self.sharding is not None and not self.values.is_meta:
            generator = torch.Generator(self.values.device).manual_seed(self.sharding.draw_seed())
        for parameter in (self.values, self.pre_values):
            if parameter is not None:
                local(parameter).normal_(0.0, self.init_std, generator=generator)
        if self.scale is not None:
            self.scale.fill_(1.0)
        self._awaits_scale = [False, False]

    @torch.no_grad()
    def fold_scale(self) -> None:
        """Multiply the parameters by the scale, rounded once to nearest, and make the scale one.

        For those who read the parameters themselves. A dense table has nothing to fold.

        Raises:
            RuntimeError: an optimizer that still exists keeps float32 copies of the parameters
                (``master_weights``), which would not follow: fold a ``copy.deepcopy`` of the table.
        """
        if self.scale is None:
            return
        if self._has_master():
            raise RuntimeError(
                "fold_scale: the master_weights of an optimizer would not follow; fold a "
                "copy.deepcopy of the table, or load its state dict into a table with "
                "grad_mode='dense'"
            )
        for parameter, scale in zip((self.values, self.pre_values), self.scale, strict=True):
            if parameter is not None:
                write_scaled(parameter, parameter, scale)
        self.scale.fill_(1.0)

    def _has_master(self) -> bool:
        """An optimizer keeps float32 copies of the parameters, in units of the same scale."""
        return any(
            "master" in optimizer.state.get(parameter, {})
            for optimizer in list(live_optimizers)
            for parameter in self.parameters()
        )

    def reserve(
        self,
        num_tokens: int,
        config: UltraMemConfig | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Have room for the factors of so many tokens before code is compiled or a CUDA graph
        captured; eager mode grows by itself.

        Args:
            num_tokens: of a step: those of a batch, times micro-batches, times the layers that
                share the table; of this rank alone where the table is sharded.
            config: of the layers; by default that of :meth:`from_config`. Not needed once a
                backward has run.
            dtype: of the layers' activations (under autocast, autocast's); by default the table's.

        Raises:
            ValueError: the table's grad_mode is "dense"; or see ``GradientFactors.reserve``.
        """
        if self.factors is None:
            raise ValueError("reserve: the table's grad_mode must be 'deferred', got 'dense'")
        config = config or self._config
        if self.sharding is not None:
            num_tokens *= self.sharding.num_shards
        if config is None or (self.factors.shape is not None and dtype is None):
            self.factors.reserve(num_tokens)
            return
        self.factors.reserve(
            num_tokens,
            num_selected=config.num_heads * config.topk,
            num_cores=self._cores_here(config.num_cores),
            num_groups=config.output_groups,
            dtype=dtype or self.values.dtype,
        )

    def _cores_here(self, num_cores: int) -> int:
        return num_cores if self.sharding is None else self.sharding.num_weights(num_cores)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``nn.Module.zero_grad``; deferred gradients are cleared, too."""
        super().zero_grad(set_to_none)
        if self.factors is not None:
            self.factors.clear()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        self._introduce(param)

    def _introduce(self, *parameters: nn.Parameter | None) -> None:
        """Have parameters know their table."""
        for parameter in parameters:
            # A shallow copy's are those of the original.
            if parameter is not None and table_of(parameter) is None:
                setattr(parameter, _PARAMETER_ATTRIBUTE, _TableReference(self))

    def _apply(self, fn: Any, recurse: bool = True) -> MemoryTable:
        before = self.scale
        super()._apply(fn, recurse)
        if before is not None and self.scale is not None and self.scale.dtype != torch.float64:
            self.scale = before.to(self.scale.device)
        self._introduce(self.values, self.pre_values)
        if self.factors is not None:
            self.factors._move(self.values.device, self.values.dtype)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        defaults = {
            "factors": None,
            "sharding": None,
            "_config": None,
            "_awaits_scale": [False, False],
        }
        super().__setstate__({**defaults, **state})
        if "scale" not in self._buffers:  # of an older version
            self._register_scale()
        self._introduce(self.values, self.pre_values)
        if self.factors is not None:
            self.factors._move(self.values.device, self.values.dtype)
            _foreign_optimizers.watch()

    def _loaded_scale(self, scale: Tensor, came: list[bool]) -> Tensor:
        """What comes with these weights or after them; an entry whose weights never came stays."""
        assert self.scale is not None
        scale = scale.detach().double()
        if any(came) and not self.scale.is_meta:
            scale = scale.clone()
            mine = (self.values, self.pre_values)
            for i, parameter in enumerate(mine):
                if parameter is not None and not (came[i] or self._awaits_scale[i]):
                    scale[i] = self.scale[i]
        self._awaits_scale = [False, False]
        return scale

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state_dict = dict(state_dict)
        key = prefix + "scale"
        mine = {prefix + "values": self.values, prefix + "pre_values": self.pre_values}
        came = [name in state_dict for name in mine]
        all_came = all(name in state_dict for name, own in mine.items() if own is not None)
        scale = state_dict.get(key)
        well_formed = isinstance(scale, Tensor) and scale.shape == (2,)
        if self.scale is not None:
            if well_formed:
                state_dict[key] = self._loaded_scale(scale, came)
            elif key not in state_dict and all_came:
                device = getattr(state_dict[prefix + "values"], "device", self.scale.device)
                state_dict[key] = torch.ones(2, dtype=torch.float64, device=device)
                self._awaits_scale = [False, False]
            elif key not in state_dict:
                self._awaits_scale = [a or b for a, b in zip(self._awaits_scale, came, strict=True)]
        elif well_formed:
            assign = local_metadata.get("assign_to_params_buffers", False)
            for (name, own), factor in zip(mine.items(), scale, strict=True):
                rows = state_dict.get(name)
                if own is not None and isinstance(rows, Tensor) and rows.shape == own.shape:
                    dtype = rows.dtype if assign else own.dtype
                    state_dict[name] = torch.empty_like(rows, dtype=dtype, requires_grad=False)
                    write_scaled(state_dict[name], rows, factor)
            if all_came:
                del state_dict[key]
        elif key in state_dict:
            got = list(scale.shape) if isinstance(scale, Tensor) else type(scale)
            error_msgs.append(f"size mismatch for {key}: must be a tensor of shape [2], got {got}.")
            return
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def rows(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        """values and pre_values."""
        return self.values, self.pre_values

    def scale_of(self, parameter: Tensor) -> Tensor | None:
        """That of one of the parameters, a scalar view."""
        if self.scale is None:
            return None
        return self.scale[0 if parameter is self.values else 1]

    def check_matches(self, config: UltraMemConfig) -> None:
        """Raise where a layer of ``config`` cannot read this table.

        Raises:
            ValueError: another number or width of rows.
            NotImplementedError: the parameters are DTensors that others have made.
        """
        if self.sharding is None and is_dtensor(self.values):
            raise NotImplementedError(
                "table: its parameters are DTensors; shard it by ultramem_cuda.parallel."
                "shard_table, and give fully_shard its parameters as ignored_params (or leave the "
                "table in FSDP's root unit)"
            )
        for name in ("num_slots", "value_dim", "pre_value_dim"):
            mine, theirs = getattr(self, name), getattr(config, name)
            if mine != theirs:
                raise ValueError(
                    f"table: {name} must be {theirs}, as in the layer's config, got {mine}"
                )

    def extra_repr(self) -> str:
        return (
            f"num_slots={self.num_slots}, value_dim={self.value_dim}, "
            f"pre_value_dim={self.pre_value_dim}, dtype={self.values.dtype}, "
            f"grad_mode={self.grad_mode!r}"
            + ("" if self.sharding is None else f", {self.sharding}")
        )
