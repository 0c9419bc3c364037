"""Optimizers for value tables: one fused pass over the rows that a step touched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _library, nvtx
from .._local import Part, is_dtensor, local, part_of
from .._retrieval_cache import is_capturing
from ..ops._checks import accumulation_dtype
from ..table import MemoryTable, live_optimizers, table_of, write_scaled
from ._table_gradient import (
    check_copies,
    deferred_table,
    dense_gradient,
    factored_gradient,
    factors_of,
    found_nonfinite,
    has_entries,
    has_gradient,
    step_cache,
)

_TABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAX_CUDA_COLUMNS = 1 << 29


def _several_processes() -> bool:
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


class MemoryOptimizer(Optimizer):
    """What MemoryAdam, MemoryAdagrad and MemorySGD share.

    Parameters may be those of tables with deferred gradients, whose factors a step consumes, and
    any others, with ``.grad`` (or ``main_grad`` where that is None). A row, and its state, is read
    and written once. With deferred gradients a step goes over the rows that tokens retrieved alone;
    a dense gradient touches all rows, as in torch.optim.

    Weight decay is decoupled. With deferred gradients p is the effective weight, parameter times
    ``table.scale``, and a step multiplies the scale by 1 - lr * weight_decay: that is the decay of
    every row, touched or not, and costs nothing. (A scale below 2^-8 goes back by a power of two,
    and all weights of the table with it, once in thousands of steps.) As in torch.optim, a step
    that finds no gradient of a parameter, of a table no factors, does not decay it. A learning rate
    on a GPU for which lr * weight_decay is not in [0, 1), which a scale cannot follow, changes
    nothing of the table, as if its gradients were not finite.

    ``state_dict()`` saves the scale that master weights were in units of beside them, as
    "master_scale" (one for parameters without a scale); after ``load_state_dict`` the next step
    converts them to the parameter's scale, whether that was loaded before or after.

    A CUDA graph may hold ``step()``, with the backward and clipping before it and ``zero_grad()``,
    after a first step outside that makes the state. A learning rate that is a number stays what it
    was at the capture; one in a tensor on the GPU is read at every replay. Where tokens did not fit
    in a table's buffers the step changes nothing of that table; ``table.factors.check()`` tells.

    ``step()`` leaves the factors to be cleared by ``zero_grad()``, which also zeroes ``main_grad``.
    Gradients that are scaled (``grad_scale``, ``found_inf``) are taken as torch's fused optimizers
    do; see :class:`GradScaler`. The same inputs give the same bits in every run, on every device.

    Parameters may be DTensors (tables of ``ultramem_cuda.parallel``, FSDP2's) that are replicated
    or sharded over one dimension of their mesh, and have states alike: a rank updates its part, as
    the whole would be updated.
    """

    handles_deferred: ClassVar[bool] = True
    _step_supports_amp_scaling = True
    _kind: ClassVar[str]

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        _library.require()
        super().__init__(params, defaults)
        live_optimizers.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        live_optimizers.add(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch.optim.Optimizer.

        Raises:
            TypeError, ValueError: an option, or a parameter that is not of a floating-point dtype
                or not contiguous.
        """
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor):
            if lr.numel() != 1:
                raise ValueError(f"lr: a tensor must have one element, got {list(lr.shape)}")
        else:
            _check_number("lr", lr)
        _check_number("weight_decay", group["weight_decay"])
        if isinstance(group["seed"], bool) or not isinstance(group["seed"], int):
            raise TypeError(f"seed: must be an int, got {group['seed']!r}")
        for param in group["params"]:
            if param.dtype not in _TABLE_DTYPES:
                raise TypeError(
                    "params: must be float32, bfloat16, float16 or float64 (CPU), got "
                    f"{param.dtype}"
                )
            part = part_of(param)
            if part.dim not in (None, 0) and param.dim() > 2:
                raise NotImplementedError(
                    "params: a DTensor of more than two dimensions must be sharded along the first "
                    f"of them, got dimension {part.dim} of {param.dim()}"
                )
            if not local(param).is_contiguous():
                raise ValueError(
                    f"params: must be contiguous, got shape {list(param.shape)} with strides "
                    f"{param.stride()}"
                )
            self._check_decay(group, param)

    def _check_decay(self, group: dict[str, Any], param: Tensor) -> None:
        if deferred_table(param) is None:
            return
        lr, weight_decay = group["lr"], group["weight_decay"]
        _check_number("weight_decay", weight_decay)
        if isinstance(lr, Tensor):
            if not lr.is_cpu:
                return  # to look at it would be to wait for the GPU
            lr = float(lr.float())  # as the kernels take it
        if not 0.0 <= lr * weight_decay < 1.0:
            raise ValueError(
                "weight_decay: lr * weight_decay must be at least 0 and below 1 for a table with "
                "grad_mode='deferred', whose scale must stay positive and not grow, got "
                f"{lr} * {weight_decay}"
            )

    def _check_size(self, param: Tensor) -> None:
        columns = self._rows(local(param)).shape[1]
        if param.is_cuda and columns > _MAX_CUDA_COLUMNS:
            raise ValueError(
                f"params: on CUDA rows have at most {_MAX_CUDA_COLUMNS} elements, got "
                f"{list(param.shape)}"
            )
        if param.is_cuda and param.dtype == torch.float64:
            raise TypeError("params: float64 is offered on the CPU only")

    def _init_state(self, state: dict[str, Any], param: Tensor, group: dict[str, Any]) -> None:
        """Adds this optimizer's own state."""

    def _new_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """A parameter's state before its first step."""
        state: dict[str, Any] = {}
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        self._init_state(state, param, group)
        if group["master_weights"] and param.dtype in (torch.bfloat16, torch.float16):
            state["master"] = param.detach().float()
        return state

    def _rows(self, tensor: Tensor) -> Tensor:
        """A contiguous tensor as [N, dim]."""
        if tensor.dim() > 1:
            return tensor.view(math.prod(tensor.shape[:-1]), tensor.shape[-1])
        return tensor.view(1, tensor.numel())

    def _first(self, param: Tensor, part: Part) -> tuple[int, int]:
        """The row and the column of the whole parameter, as [N, dim], where this rank's part
        begins."""
        if part.dim is None:
            return 0, 0
        if part.dim == 0 and param.dim() > 1:
            return part.offset * math.prod(param.shape[1:-1]), 0
        return 0, part.offset

    @torch.no_grad()
    @nvtx.annotate(lambda self, *_, **__: f"{type(self).__name__} step")
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            NotImplementedError: deferred gradients in a job of several processes, of a table that
                ``ultramem_cuda.parallel`` does not know.
            ValueError, TypeError: a parameter that CUDA does not offer, or a weight decay that a
                table with deferred gradients does not; in a CUDA graph, a learning rate on the CPU.
            RuntimeError: a table's buffers overflowed, a gradient is sparse, a table with deferred
                gradients has a ``.grad`` too, or weight decay but no scale, factors came after
                clipping, or factors that no :class:`GradScaler` of this package has unscaled; in a
                CUDA graph, there is no state yet, clipping was not captured with the step, or a
                GradScaler steps a table with deferred gradients. Nothing has then been updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        found_inf = getattr(self, "found_inf", None)
        loss_scale = getattr(self, "grad_scale", None)
        found_inf = found_inf if isinstance(found_inf, Tensor) else None
        loss_scale = loss_scale if isinstance(loss_scale, Tensor) else None
        work = self._collect()
        if hasattr(self, "found_inf"):  # a GradScaler's step
            found_inf = self._check_scaled(work, found_inf, loss_scale)
        for stream, group, param, table in work:
            self._update(param, table, group, stream, found_inf, loss_scale)
        return loss

    def _collect(self) -> list[tuple[int, dict[str, Any], Tensor, MemoryTable | None]]:
        """Parameters to update, with the number of each among all. Everything that can be wrong
        with them raises here."""
        work: list[tuple[int, dict[str, Any], Tensor, MemoryTable | None]] = []
        stream = -1
        for deferred in self._tables():
            if not is_capturing(deferred.values.device):
                factors_of(deferred).check()
                check_copies(deferred)
            if deferred.sharding is None and _several_processes():
                raise NotImplementedError(
                    "step: a table with grad_mode='deferred' in a job of several processes, whose "
                    "factors nothing exchanges; use ultramem_cuda.parallel.shard_table or "
                    "replicate_table, or grad_mode='dense'"
                )
        for group in self.param_groups:
            for param in group["params"]:
                stream += 1
                if not param.requires_grad:
                    continue  # its factors may be there all the same
                _check_current(param)
                table = deferred_table(param)
                if table is not None:
                    self._check_decay(group, param)
                    if param.grad is not None:
                        raise RuntimeError(
                            "step: a parameter of a table with grad_mode='deferred' has a .grad "
                            "too; a loss on the parameter itself needs grad_mode='dense'"
                        )
                    if not has_gradient(table, param):
                        continue
                    if table.scale is None and group["weight_decay"] != 0.0:
                        raise RuntimeError(
                            "step: weight_decay of a table with factors needs the table's scale, "
                            "which it has where it was made with grad_mode='deferred'"
                        )
                else:
                    grad = dense_gradient(param)
                    if grad is None or param.numel() == 0:
                        continue
                    _check_placed_alike(param, grad)
                    if grad.is_sparse:
                        raise RuntimeError("step: sparse gradients are not supported")
                    self._check_size(param)
                if is_capturing(param.device):
                    self._check_captured(group, param, table)
                work.append((stream, group, param, table))
        for deferred in self._tables():
            if has_entries(deferred):
                step_cache(deferred)
        return work

    def _check_captured(
        self, group: dict[str, Any], param: Tensor, table: MemoryTable | None
    ) -> None:
        """Refuse what would do something else, or nothing, at the replays of a CUDA graph."""
        state = self.state.get(param)
        if not state or "master_scale" in state:
            raise RuntimeError(
                "step: a CUDA graph that is captured before a first step, or before the first one "
                "after load_state_dict(), would prepare the state at every replay; step once before"
            )
        lr = group["lr"]
        if isinstance(lr, Tensor) and not lr.is_cuda:
            raise ValueError(
                "lr: must be on the GPU, or a number, while a CUDA graph is captured, got a tensor "
                f"on {lr.device}"
            )
        if table is not None and hasattr(self, "found_inf"):
            raise RuntimeError(
                "step: a GradScaler's step of a table with grad_mode='deferred' cannot be captured "
                "in a CUDA graph"
            )

    def _tables(self) -> list[MemoryTable]:
        """Those with deferred gradients, each once, in the order of the parameters."""
        tables = (deferred_table(p) for group in self.param_groups for p in group["params"])
        return list({id(t): t for t in tables if t is not None}.values())

    def _check_scaled(
        self,
        work: list[tuple[int, dict[str, Any], Tensor, MemoryTable | None]],
        found_inf: Tensor | None,
        loss_scale: Tensor | None,
    ) -> Tensor | None:
        """found_inf, with that of the gradients which torch's GradScaler does not know."""
        if loss_scale is None and any(t is None and p.grad is None for _, _, p, t in work):
            raise RuntimeError("step: GradScaler.unscale_ does not reach main_grad")
        for table in self._tables():
            if not has_entries(table) or step_cache(table).unscaled:
                continue
            if loss_scale is None:
                raise RuntimeError(
                    "step: GradScaler.unscale_ does not reach deferred gradients; use "
                    "ultramem_cuda.optim.GradScaler in place of torch.amp.GradScaler"
                )
            found = found_nonfinite(table)
            found_inf = found if found_inf is None else torch.maximum(found_inf.to(found), found)
        return found_inf

    @nvtx.annotate("ultramem::table_update")
    def _update(
        self,
        param: Tensor,
        table: MemoryTable | None,
        group: dict[str, Any],
        stream: int,
        found_inf: Tensor | None,
        loss_scale: Tensor | None,
    ) -> None:
        rows = self._rows(local(param))
        state = self.state[param]
        if not state:
            state.update(self._new_state(param, group))

        if rows.numel() == 0:  # a DTensor, of which other ranks have all
            went = 1.0 if found_inf is None else (found_inf == 0).to(state["step"])
            state["step"].add_(went)
            return
        grad: Tensor | None = None
        scale: Tensor | None = None
        factored: tuple[Any, ...]
        if table is None:
            dense = dense_gradient(param)
            assert dense is not None
            grad = self._rows(local(dense).contiguous())
            factored = (None,) * 8 + (0,)
            grad_scale = None
        else:
            cache = step_cache(table)
            gradient = factored_gradient(table, param)
            assert gradient is not None
            factored = (*cache.grouping, *gradient)
            grad_scale = cache.grad_scale
            scale = table.scale_of(param)
            if is_capturing(param.device):  # else it has raised
                found_inf = factors_of(table).overflowed()
                if table.sharding is not None:
                    found_inf = table.sharding.max_over_mesh(found_inf)
        if "master_scale" in state:  # loaded since the last step
            ratio = state.pop("master_scale").cpu() / (1.0 if scale is None else scale.cpu())
            if ratio != 1.0:
                write_scaled(state["master"], state["master"], ratio)

        def on_device(scalar: Tensor | None) -> Tensor | None:
            return (
                None
                if scalar is None
                else scalar.detach().to(param.device, torch.float32).reshape(())
            )

        lr = group["lr"]
        beta1, beta2 = group.get("betas", (0.0, 0.0))
        optional = {
            name: self._rows(local(state[name])) if name in state else None
            for name in ("master", "exp_avg", "exp_avg_sq")
        }
        part = part_of(param)
        torch.ops.ultramem.table_update(
            self._kind,
            rows,
            optional["master"],
            optional["exp_avg"],
            optional["exp_avg_sq"],
            local(state.get("sum")),
            state["step"],
            scale,
            grad,
            *factored,
            on_device(lr) if isinstance(lr, Tensor) else None,
            on_device(grad_scale),
            on_device(loss_scale),
            on_device(found_inf),
            1.0 if isinstance(lr, Tensor) else float(lr),
            float(beta1),
            float(beta2),
            float(group.get("eps", 0.0)),
            float(group["weight_decay"]),
            group["stochastic_rounding"],
            group["seed"],
            stream,
            *self._first(param, part),
            *self._whole_rows(param, part, grad, factored),
        )

    def _whole_rows(
        self, param: Tensor, part: Part, grad: Tensor | None, factored: tuple[Any, ...]
    ) -> tuple[Tensor | None, int]:
        """What an optimizer needs of the rows beyond this rank's columns: the squares of the
        gradient's rows, and how many columns there are. See table_update."""
        return None, 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears ``.grad``, ``main_grad`` and the factors of tables with deferred gradients."""
        super().zero_grad(set_to_none)
        for table in self._tables():
            factors = factors_of(table)
            factors.clear()
            factors.step_cache = None
        for group in self.param_groups:
            for param in group["params"]:
                main_grad = getattr(param, "main_grad", None)
                if main_grad is not None:
                    main_grad.zero_()
                    param.grad_added_to_main_grad = False

    def _numbered(self, state_dict: dict[str, Any]) -> Iterator[tuple[Any, Tensor]]:
        """The parameters with their numbers in a state dict."""
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        return zip(numbers, params, strict=True)

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the "master_scale" of master weights."""
        state_dict = super().state_dict()
        for number, param in self._numbered(state_dict):
            state = state_dict["state"].get(number, {})
            if "master" in state and "master_scale" not in state:
                table = deferred_table(param)
                scale = None if table is None else table.scale_of(param)
                if scale is None:
                    scale = torch.ones((), dtype=torch.float64, device=param.device)
                state_dict["state"][number] = {**state, "master_scale": scale.detach().clone()}
        return state_dict

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but tensors keep the dtype that they were saved in."""
        super().load_state_dict(state_dict)
        for saved_id, param in self._numbered(state_dict):
            for name, value in state_dict["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor):
                    self.state[param][name] = value.to(param.device, copy=True)


def _check_current(param: Tensor) -> None:
    table = table_of(param)
    if table is not None and not any(param is mine for mine in table.rows()):
        raise RuntimeError(
            "step: a parameter that its table has replaced, as shard_table and replicate_table do; "
            "make the optimizer afterwards"
        )


def _check_placed_alike(param: Any, grad: Any) -> None:
    placed = [list(t.placements) if is_dtensor(t) else None for t in (param, grad)]
    if placed[0] != placed[1]:
        raise RuntimeError(
            f"step: a gradient must be placed as its parameter is, {placed[0]}, got {placed[1]}"
        )


def _placed_by_rows(sums: Tensor, param: Any) -> Tensor:
    """One number a row, placed as the rows of a DTensor are."""
    from torch.distributed.tensor import DTensor, Replicate

    placements = [p if p.is_shard(0) else Replicate() for p in param.placements]
    shape = torch.Size((param.shape[0],))
    mesh = param.device_mesh
    return DTensor.from_local(sums, mesh, placements, run_check=False, shape=shape, stride=(1,))


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: must be a number, got {value!r}")
    if not (math.isfinite(value) and value >= 0.0):
        raise ValueError(f"{name}: must be finite and not negative, got {value}")


class MemoryAdam(MemoryOptimizer):
    """Adam (arXiv 1412.6980), with decoupled weight decay (AdamW, arXiv 1711.05101).

    For each row that the step touched, g its gradient:

        m <- m + (1 - beta1) (g - m);  v <- beta2 v + (1 - beta2) g^2
        p <- p - lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)

    With dense gradients this is torch.optim.AdamW. With deferred ones it is torch.optim.SparseAdam:
    untouched rows keep their moments, the bias correction counts all steps, and eps is added before
    the correction of v: sqrt(v / (1 - beta2^step)) + eps / sqrt(1 - beta2^step).

    State, per parameter: "step" (float32 scalar), "exp_avg" and "exp_avg_sq" (like the parameter,
    in ``state_dtype``), with ``master_weights`` "master" (float32). A bfloat16 table with
    bfloat16 states takes 6 bytes an element in all.

    Args:
        params: parameters or groups, also from :func:`param_groups`.
        lr: learning rate, a number or a tensor of one element.
        betas: decay rates of m and v, in [0, 1).
        eps: added to the root of v.
        weight_decay: p <- p * (1 - lr * weight_decay) before the update, of all rows. For tables
            with deferred gradients lr * weight_decay must be below 1 (a step whose learning rate
            is a tensor on a GPU does nothing to the table otherwise).
        state_dtype: of m and v: None (float32), torch.float32 or torch.bfloat16. float64
            parameters have float64 states.
        master_weights: keep a float32 copy of bfloat16 and float16 parameters, which are then
            rounded to nearest from it. Set a parameter anew, or fold a table's scale, only before
            the first step.
        stochastic_rounding: round bfloat16 and float16 parameters, and bfloat16 states, up or down
            at random, without bias: steps below half a unit in the last place are not lost.
            (v times 0.999 rounded to nearest bfloat16 would never fall.)
        seed: of the random numbers, which depend on it, on the position of the parameter among the
            groups, the step, the row and the column alone.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """

    _kind = "adam"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "state_dtype": state_dtype,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        _check_number("eps", group["eps"])
        if len(group["betas"]) != 2:
            raise ValueError(f"betas: must be two numbers, got {group['betas']!r}")
        for beta in group["betas"]:
            _check_number("betas", beta)
            if beta >= 1.0:
                raise ValueError(f"betas: must be in [0, 1), got {group['betas']!r}")
        if group["state_dtype"] not in (None, torch.float32, torch.bfloat16):
            raise ValueError(
                "state_dtype: must be None, torch.float32 or torch.bfloat16, got "
                f"{group['state_dtype']!r}"
            )

    def _init_state(self, state: dict[str, Any], param: Tensor, group: dict[str, Any]) -> None:
        dtype = group["state_dtype"] or torch.float32
        if param.dtype == torch.float64:
            dtype = torch.float64
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(param, dtype=dtype)


class MemoryAdagrad(MemoryOptimizer):
    """Row-wise Adagrad: one accumulator a row, as FBGEMM's EXACT_ROWWISE_ADAGRAD keeps for
    embedding tables (after Duchi, Hazan, Singer, JMLR 2011).

    For each row that the step touched, g its gradient:

        s <- s + mean over the row of g^2
        p <- p - lr * g / (sqrt(s) + eps)

    A parameter of more than two dimensions has shape[0] rows; one of a single dimension has rows of
    one element, which makes it torch.optim.Adagrad.

    State, per parameter: "step" (float32 scalar), "sum" (float32 [N], float64 for float64
    parameters), with ``master_weights`` "master" (float32). A bfloat16 table takes 2 bytes an
    element and 4 a row.

    Args:
        params, lr, weight_decay, master_weights, stochastic_rounding, seed: as in
            :class:`MemoryAdam`.
        eps: added to the root of s.
        initial_accumulator_value: s before the first step.

    Raises:
        TypeError, ValueError: as :class:`MemoryAdam`.
    """

    _kind = "adagrad"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        *,
        initial_accumulator_value: float = 0.0,
        master_weights: bool = False,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        _check_number("eps", group["eps"])
        _check_number("initial_accumulator_value", group["initial_accumulator_value"])

    def _rows(self, tensor: Tensor) -> Tensor:
        if tensor.dim() == 0:
            return tensor.view(1, 1)
        return tensor.view(tensor.shape[0], math.prod(tensor.shape[1:]))

    def _first(self, param: Tensor, part: Part) -> tuple[int, int]:
        return (part.offset, 0) if part.dim == 0 else super()._first(param, part)

    def _whole_rows(
        self, param: Tensor, part: Part, grad: Tensor | None, factored: tuple[Any, ...]
    ) -> tuple[Tensor | None, int]:
        if part.dim != 1:
            return None, 0
        if grad is not None:
            squares = grad.to(accumulation_dtype(param.dtype)).square().sum(1)
        else:
            num_rows = local(param).shape[0]
            squares = torch.ops.ultramem.table_grad_row_sq(*factored, num_rows)
        torch.distributed.all_reduce(squares, group=part.group)
        for copies in part.copies:  # to the bit, whatever order each group has summed in
            torch.distributed.broadcast(squares, group=copies, group_src=0)
        return squares, param.shape[1]

    def _init_state(self, state: dict[str, Any], param: Tensor, group: dict[str, Any]) -> None:
        dtype = accumulation_dtype(param.dtype)
        start = group["initial_accumulator_value"]
        num_rows = self._rows(local(param)).shape[0]
        sums = torch.full((num_rows,), start, dtype=dtype, device=param.device)
        state["sum"] = _placed_by_rows(sums, param) if is_dtensor(param) else sums


class MemorySGD(MemoryOptimizer):
    """Gradient descent, p <- p - lr * g, for the rows that the step touched.

    There is no momentum: a row's velocity would have to go on moving it, and decay, in steps that
    do not touch it.

    State, per parameter: "step" (float32 scalar; counts for the random numbers), with
    ``master_weights`` "master" (float32).

    Args:
        params, lr, weight_decay, master_weights, stochastic_rounding, seed: as in
            :class:`MemoryAdam`.

    Raises:
        TypeError, ValueError: as :class:`MemoryAdam`.
    """

    _kind = "sgd"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        *,
        master_weights: bool = False,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)
