"""Deferred gradients of a table: the factors that the backward leaves behind instead of gradients
as large as the table."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import _library, nvtx
from ._retrieval_cache import is_capturing

_HEADER_BYTES = 256
# The capacity is a multiple of so many tokens (csrc/include/ultramem/table_factors.h).
_TOKENS = 256
# Entries whose rows to_dense and to_sparse hold in memory at once.
_ENTRIES_AT_ONCE = 1 << 16


@dataclasses.dataclass(frozen=True)
class FactorShape:
    """What all factors of one table have in common; the first use fixes it.

    Attributes:
        num_selected: slots a token retrieves in a layer, S = H*M.
        num_cores: C.
        num_groups: E where out is [T, E, Dv] (``sum_groups=False``), else 1.
        dtype: of pre_input and out (without pre-values, of the values).
    """

    num_selected: int
    num_cores: int
    num_groups: int
    dtype: torch.dtype

    def agrees_with(self, other: FactorShape) -> bool:
        """Equality that torch.compile can trace where sizes are symbols."""
        return bool(
            self.num_selected == other.num_selected
            and self.num_cores == other.num_cores
            and self.num_groups == other.num_groups
            and self.dtype == other.dtype
        )

    def __str__(self) -> str:
        return f"S = {self.num_selected}, C = {self.num_cores}, E = {self.num_groups}, {self.dtype}"


class GradientFactors:
    """Factors of the gradients of a table's values and pre-values, in buffers of their own.

    ::

        grad_values[slots[e], slice c] += weights[e, c] * grad_outs[token_e, group_e, slice c]
        grad_pre_values[slots[e]]      += grad_a[e] * pre_inputs[token_e]

    for every entry e, a slot that a token retrieved in a layer: token_e = e // num_selected. Each
    backward of ``ops.value_ffn(..., factors=...)`` appends its tokens; layers and micro-batches add
    up until :meth:`clear`. A ``MemoryTable`` with ``grad_mode="deferred"`` has one as ``factors``.
    Where the table has a scale, the gradients are those of the effective weights, parameters times
    scale.

    Memory: a token takes ``bytes_per_token``, which is ``num_selected * (4 + a*C + a)`` (a: bytes
    of the accumulation dtype, 4; without pre-values the last a is not there; with
    ``sum_groups=False`` one more) and one copy of its rows of grad_out and pre_input.
    :meth:`reserve` takes exactly what is asked for, rounded up to 256 tokens. Without it a backward
    that finds no room doubles the capacity, so that at most twice what the largest step needs is
    held (and the old buffers beside the new while they are copied).

    Only eager mode grows. Compiled code and CUDA graphs append without Python: reserve before.
    Tokens for which there is no room are then not written but counted, and :meth:`check` raises.

    Appends are counted on the host, too, so that nothing here waits for the GPU; but not those of a
    replayed CUDA graph. From the first capture on, ``num_tokens``, the views, :meth:`check` and
    every eager backward synchronise to read the count, and the buffers cannot grow, for the graph
    writes to them. (Nor may they grow between a forward and a backward that inductor compiled: it
    asserts their size.)

    While a CUDA graph is being captured nobody knows how many tokens its replays will find. The
    views are then those of the whole capacity, and ``slots`` is -1 for what is not held: clipping
    and steps read them so, and take time for the capacity. What did not fit stays counted when a
    graph clears, so that :meth:`check` still tells of it, and a step in a graph changes nothing.

    CUDA streams: appends are ordered by the stream that they run on. In eager mode a backward, and
    whatever is called here, waits for the stream used before it. Compiled code and replayed graphs
    that append on several streams are the caller's to order, and so is reading what they appended
    on another stream.

    A copy (``deepcopy``, ``pickle``) is empty, as are the factors of a table that is moved to
    another device or dtype.

    Args:
        num_slots: rows of the table, N, fewer than 2^32 - 1.
        value_dim: Dv.
        pre_value_dim: Dp; 0 without pre-values.
        dtype: of the table.
        device: of the table.
    """

    def __init__(
        self,
        num_slots: int,
        value_dim: int,
        pre_value_dim: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if not 0 < num_slots < 2**32 - 1:
            raise ValueError(f"num_slots: must be in [1, 2^32 - 2], got {num_slots}")
        self.num_slots = num_slots
        self.value_dim = value_dim
        self.pre_value_dim = pre_value_dim
        self.dtype = dtype
        self._shape: FactorShape | None = None
        self._sections: tuple[int, ...] = ()
        self._start_empty(torch.empty(0, device=device).device)

    def _start_empty(self, device: torch.device) -> None:
        # What clipping and steps know of the present factors; see optim.
        self.step_cache: Any = None
        self._gathered: GradientFactors | None = None
        self._lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None
        # See _library.FactorsState.
        self._strangers = 0
        # One tensor object for good: graphs of compiled code and saved contexts hold it, so new
        # memory is put into it.
        self._arena = self._allocate(0, device)
        # As torch._dynamo.mark_static_address has it, whose import takes seconds: CUDA graphs of
        # mode="reduce-overhead" would else not write to an input.
        self._arena._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
        self._count(0)
        self._arena._ultramem_factors = weakref.ref(self)  # type: ignore[attr-defined]

    # ---- what is there -------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self._arena.device

    @property
    def accumulation_dtype(self) -> torch.dtype:
        """Of weights, grad_a and the gradients: float32, or float64 for a float64 table."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def shape(self) -> FactorShape | None:
        """What the first use fixed; None before."""
        return self._shape

    @property
    def arena(self) -> Tensor:
        """The buffers, uint8 [nbytes]: a header (int64: tokens held, tokens that did not fit) and
        the sections, as csrc/include/ultramem/table_factors.h lays them out."""
        return self._arena

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return self._arena.numel()

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a token of one layer takes; 0 before the first use."""
        return self._sections[-1] if self._sections else 0

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        if self._shape is None:
            return 0
        return (self._arena.numel() - _HEADER_BYTES) // self._sections[-1]

    @property
    def num_tokens(self) -> int:
        """Tokens held, each layer's counted.

        Raises:
            RuntimeError: while a CUDA graph is captured.
        """
        return self._counts()[0]

    @property
    def num_selected(self) -> int:
        """Entries of a token, S; 0 before the first use."""
        return 0 if self._shape is None else self._shape.num_selected

    @property
    def slots(self) -> Tensor:
        """Rows of the entries, [n], as the int32 of the same bits as a uint32; -1 where the index
        was out of range, which has zero weights. A view, as all of these: valid until the buffers
        grow. (Of the slots of a capture a copy.)"""
        slots = self._view(0, torch.int32, (self.num_selected,))
        if is_capturing(self.device):
            held = torch.arange(slots.shape[0], device=self.device) < self._header[0]
            slots = torch.where(held[:, None], slots, -1)
        return slots.flatten()

    @property
    def weights(self) -> Tensor:
        """act(a) * score, [n, C] in the accumulation dtype."""
        num_cores = 1 if self._shape is None else self._shape.num_cores
        view = self._view(1, self.accumulation_dtype, (self.num_selected, num_cores))
        return view.flatten(0, 1)

    @property
    def grad_a(self) -> Tensor | None:
        """Gradients of the pre-activations, [n] in the accumulation dtype; None without
        pre-values."""
        if not self.pre_value_dim:
            return None
        return self._view(2, self.accumulation_dtype, (self.num_selected,)).flatten()

    @property
    def groups(self) -> Tensor | None:
        """Groups of the entries, uint8 [n]; None where there is one group."""
        if self._shape is None or self._shape.num_groups == 1:
            return None
        return self._view(3, torch.uint8, (self.num_selected,)).flatten()

    @property
    def grad_outs(self) -> Tensor:
        """Gradients of the outputs, [tokens, E or 1, Dv]."""
        num_groups = 1 if self._shape is None else self._shape.num_groups
        return self._view(4, self._row_dtype, (num_groups, self.value_dim))

    @property
    def pre_inputs(self) -> Tensor | None:
        """Inputs of the pre-values, [tokens, Dp]; None without pre-values."""
        if not self.pre_value_dim:
            return None
        return self._view(5, self._row_dtype, (self.pre_value_dim,))

    @property
    def _row_dtype(self) -> torch.dtype:
        return self.dtype if self._shape is None else self._shape.dtype

    def _view(self, section: int, dtype: torch.dtype, row: tuple[int, ...]) -> Tensor:
        """The used prefix of a section, [tokens, *row]; all of it during a capture."""
        self._enter_stream()
        tokens = self.capacity if is_capturing(self.device) else self.num_tokens
        if self._shape is None:
            return torch.empty((0, *row), dtype=dtype, device=self.device)
        begin = _HEADER_BYTES + self.capacity * self._sections[section]
        width = self._sections[section + 1] - self._sections[section]
        flat = self._arena[begin : begin + tokens * width]
        return flat.view(dtype).view(tokens, *row)

    @property
    def _header(self) -> Tensor:
        """Tokens held and tokens that did not fit, int64 [2] on the device."""
        return self._arena[:16].view(torch.int64)

    @property
    def appends(self) -> int:
        """Of a GPU's buffers, how often something was appended or a graph captured that will."""
        return _library.factors_state(self._arena.data_ptr()).appends if self._arena.is_cuda else 0

    def overflowed(self) -> Tensor:
        """float32 scalar on the device: 1 where there were tokens without room, else 0."""
        return (self._header[1] > 0).float()

    def check(self) -> None:
        """Raise where factors are missing because there was no room for them.

        Raises:
            RuntimeError: naming ``reserve`` and how much it needs; or while a CUDA graph is
                captured.
        """
        held, overflow = self._counts()
        if overflow:
            raise RuntimeError(
                f"factors: {overflow} tokens did not fit beside {held} in the {self.capacity} "
                "reserved, and their gradients are lost: clear(), then reserve(num_tokens) for at "
                f"least {held + overflow} tokens (of all layers and micro-batches of a step "
                "together) before running compiled code or capturing a CUDA graph"
            )

    # ---- room ----------------------------------------------------------------------------------

    def reserve(
        self,
        num_tokens: int,
        *,
        num_selected: int | None = None,
        num_cores: int | None = None,
        num_groups: int = 1,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Have room for ``num_tokens`` tokens in all; what is held is kept.

        A step needs the tokens of a batch, times its micro-batches, times the layers that share the
        table. If memory runs out, everything is as before.

        Args:
            num_tokens: exact but for rounding up to a multiple of 256. Never shrinks.
            num_selected, num_cores, num_groups, dtype: the :class:`FactorShape`, where no use has
                fixed it yet; dtype defaults to the table's.

        Raises:
            ValueError: another shape than the one fixed, or none known.
            RuntimeError: the buffers would have to grow while a CUDA graph is being captured, or
                after one has been captured that writes to them.
        """
        if isinstance(num_tokens, bool) or not isinstance(num_tokens, int):
            raise TypeError(f"reserve: num_tokens must be an int, got {num_tokens!r}")
        if num_tokens < 0:
            raise ValueError(f"reserve: num_tokens must not be negative, got {num_tokens}")
        if num_selected is not None:
            wanted = FactorShape(num_selected, num_cores or 1, num_groups, dtype or self.dtype)
            self._fix_shape(wanted, "reserve")
        elif self._shape is None:
            raise ValueError(
                "reserve: no backward has said how many slots a token retrieves; give num_selected "
                "(H * topk), num_cores, num_groups and dtype"
            )
        with self._lock:
            if num_tokens > self.capacity:
                self._enter_stream()
                self._grow(num_tokens, num_tokens)

    def clear(self) -> None:
        """Forget all factors; the buffers stay.

        While a CUDA graph is captured, that is what its replays do, but for the count of tokens
        that did not fit.
        """
        self.step_cache = None
        if self.capacity == 0:
            return
        captured = is_capturing(self.device)
        with self._lock:
            self._enter_stream()
            # Through `data`: graphs of compiled code have saved the arena, at this version.
            self._arena.data[: 8 if captured else _HEADER_BYTES].zero_()
            self._count(0, captured=captured)
        if self._gathered is not None:
            self._gathered.clear()

    def release(self) -> None:
        """Give the buffers back, and forget the shape that the first use fixed.

        Raises:
            RuntimeError: a captured CUDA graph writes to them.
        """
        with self._lock:
            if self._is_captured():
                raise RuntimeError("factors: a captured CUDA graph writes to the buffers")
            self._enter_stream()
            self.step_cache = None
            self._shape, self._sections = None, ()
            self._replace(self._allocate(0, self.device))
            self._count(0)
            self._gathered = None

    def _fix_shape(self, shape: FactorShape, op: str) -> None:
        if self._shape is not None:
            if not shape.agrees_with(self._shape):
                raise ValueError(
                    f"{op}: factors are those of {self._shape}, fixed by reserve() or the first "
                    f"use, got {shape}; all layers that share a table must agree (release() starts "
                    "anew)"
                )
            return
        if not 1 <= shape.num_groups <= 256:
            raise ValueError(
                f"{op}: factors offer up to 256 groups E with sum_groups=False, got "
                f"{shape.num_groups}"
            )
        sizes = (shape.num_selected, self.value_dim, self.pre_value_dim)
        counts = (shape.num_cores, shape.num_groups)
        self._sections = _library.factors_sections((*sizes, *counts), (self.dtype, shape.dtype))
        self._shape = shape

    def _allocate(self, num_tokens: int, device: torch.device) -> Tensor:
        capacity = -(-num_tokens // _TOKENS) * _TOKENS
        # An ordinary tensor, also under inference_mode: autograd will write to it.
        with torch.inference_mode(False):
            nbytes = _HEADER_BYTES + capacity * self.bytes_per_token
            arena = torch.empty(nbytes, dtype=torch.uint8, device=device)
            arena[:_HEADER_BYTES].zero_()
        if arena.is_cuda:
            _library.forget_factors_state(arena.data_ptr())
        return arena

    def _grow(self, num_tokens: int, at_least: int) -> None:
        if is_capturing(self.device):
            raise RuntimeError(
                "factors: the buffers must not grow while a CUDA graph is captured; call "
                f"reserve(num_tokens) with at least {at_least} before"
            )
        if self._is_captured():
            raise RuntimeError(
                f"factors: the buffers cannot grow from {self.capacity} to {at_least} tokens, for "
                "a captured CUDA graph writes to them; call reserve(num_tokens) before capturing"
            )
        try:
            arena = self._allocate(num_tokens, self.device)
        except RuntimeError:  # out of memory
            if num_tokens == at_least:
                raise
            arena = self._allocate(at_least, self.device)
        old_capacity, sections = self.capacity, self._sections
        new_capacity = (arena.numel() - _HEADER_BYTES) // sections[-1]
        held, overflow = self._counts()
        arena[:_HEADER_BYTES].copy_(self._arena[:_HEADER_BYTES])
        for begin, end in itertools.pairwise(sections):
            size = held * (end - begin)
            if size:
                to, from_ = (_HEADER_BYTES + n * begin for n in (new_capacity, old_capacity))
                arena[to : to + size].copy_(self._arena[from_ : from_ + size])
        self._replace(arena)
        self._count(held, overflow)

    def _replace(self, arena: Tensor) -> None:
        if self._arena.is_cuda:
            # The current stream may still copy from it when its memory is given out again.
            self._arena.record_stream(torch.cuda.current_stream(self.device))
            _library.forget_factors_state(self._arena.data_ptr())
        self._arena.data = arena

    def _is_captured(self) -> bool:
        return self._arena.is_cuda and _library.factors_state(self._arena.data_ptr()).captured

    def _counts(self) -> tuple[int, int]:
        """Tokens held, and tokens that did not fit."""
        if self._arena.is_meta:
            return 0, 0
        if is_capturing(self.device):
            raise RuntimeError(
                "factors: how many tokens there are is not known while a CUDA graph is captured"
            )
        if self._arena.is_cuda:
            state = _library.factors_state(self._arena.data_ptr())
            if not state.captured and state.strangers == self._strangers:
                return state.num_tokens, state.overflow
        held, overflow = self._header.tolist()
        return held, overflow

    def _count(self, num_tokens: int, overflow: int = 0, captured: bool = False) -> None:
        """Note what the arena holds from now on, or from the replays of a graph on."""
        if self._arena.is_cuda:
            _library.set_factors_state(self._arena.data_ptr(), num_tokens, overflow, captured)
            self._strangers = _library.factors_state(self._arena.data_ptr()).strangers

    def _enter_stream(self) -> None:
        """Let the current stream wait for the one that was used before.

        A stream that is capturing cannot wait for what the capture does not hold.
        """
        if not is_capturing(self.device):
            self._follow_stream()

    def _follow_stream(self) -> None:
        if not self._arena.is_cuda:
            return
        stream = torch.cuda.current_stream(self.device)
        if self._stream is not None and stream != self._stream:
            stream.wait_stream(self._stream)
            self._arena.record_stream(stream)
        self._stream = stream

    # ---- the operator's side -------------------------------------------------------------------

    def _for_forward(self, values: Tensor, pre_values: Tensor | None, shape: FactorShape) -> Tensor:
        """The arena, for the operator to hand to its backward."""
        pre_value_dim = 0 if pre_values is None else pre_values.shape[1]
        mine = (self.num_slots, self.value_dim, self.pre_value_dim)
        theirs = (values.shape[0], values.shape[1], pre_value_dim)
        if mine != theirs or self.dtype != values.dtype:
            raise ValueError(
                f"value_ffn: factors are those of a table with N, Dv, Dp = {mine} of {self.dtype}, "
                f"got {theirs} of {values.dtype}"
            )
        if torch.compiler.is_compiling():
            if self._shape is None or self._arena.numel() == _HEADER_BYTES:
                raise RuntimeError(
                    "value_ffn: factors do not grow in compiled code; call "
                    "table.reserve(num_tokens) before it runs"
                )
        elif self._arena.device != values.device and self._arena.numel() == _HEADER_BYTES:
            self._start_empty(values.device)
        self._fix_shape(shape, "value_ffn")
        if self._arena.device != values.device:
            raise ValueError(
                f"value_ffn: factors must be on the device of values, {values.device}, "
                f"got {self._arena.device}"
            )
        return self._arena

    @contextlib.contextmanager
    def _appending(self, num_tokens: int) -> Iterator[Tensor]:
        """The arena, with room for so many more tokens; what is done to it is one append."""
        with self._lock:
            if is_capturing(self.device):
                if self.capacity == 0:
                    raise RuntimeError(
                        "value_ffn: factors do not grow while a CUDA graph is captured; call "
                        "table.reserve(num_tokens) before"
                    )
            else:
                self._follow_stream()
                needed = self._counts()[0] + num_tokens
                if needed > self.capacity:
                    self._grow(max(needed, 2 * self.capacity), needed)
            yield self._arena

    def _move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Belong to a table on that device and of that dtype; what is held is dropped if that is
        another."""
        if device == self.device and dtype == self.dtype:
            return
        if dtype != self.dtype:
            self.dtype = dtype
            self._shape, self._sections = None, ()
        self._start_empty(device)

    # ---- over processes ------------------------------------------------------------------------

    def gathered(self, group: torch.distributed.ProcessGroup) -> GradientFactors:
        """The factors of all ranks of a group, in the order of the ranks, on each of them.

        All must hold the same number of tokens. The result belongs to this object, which clears it
        with itself.
        """
        num_ranks = torch.distributed.get_world_size(group)
        tokens, gathered = self.num_tokens, self._gathered
        if gathered is None:
            dims = (self.num_slots, self.value_dim, self.pre_value_dim)
            gathered = GradientFactors(*dims, dtype=self.dtype, device=self.device)
            self._gathered = gathered
        gathered.clear()
        if self._shape is None:
            return gathered
        gathered._fix_shape(self._shape, "gathered")
        gathered.reserve(num_ranks * tokens)
        gathered._enter_stream()
        for begin, end in itertools.pairwise(self._sections):
            to, from_ = (_HEADER_BYTES + f.capacity * begin for f in (gathered, self))
            size = tokens * (end - begin)
            if size:
                torch.distributed.all_gather_into_tensor(
                    gathered._arena[to : to + num_ranks * size],
                    self._arena[from_ : from_ + size],
                    group=group,
                )
        gathered._arena[:8].view(torch.int64).fill_(num_ranks * tokens)
        gathered._count(num_ranks * tokens)
        return gathered

    # ---- as gradients --------------------------------------------------------------------------

    def to_dense(self) -> tuple[Tensor, Tensor | None]:
        """The gradients (of values [N, Dv], of pre_values [N, Dp] or None; with a scale, of the
        effective ones) in the accumulation dtype. As large as the table: for tests and small
        tables.

        Whether a table trains (``requires_grad``) is not looked at.
        """
        rows = self.slots.long() & 0xFFFFFFFF
        return self._sum(rows, self.num_slots)

    def to_sparse(self) -> tuple[Tensor, Tensor | None]:
        """The gradients as coalesced ``torch.sparse`` tensors whose values are whole rows, for
        optimizers that take them (``torch.optim.SparseAdam``)."""
        rows = self.slots.long() & 0xFFFFFFFF
        touched, rows = torch.unique(rows, return_inverse=True)
        # Only -1, unsigned, lies beyond the table; it sorts last.
        touched = touched[touched < self.num_slots]
        sums = self._sum(rows, touched.numel())

        def sparse(rows: Tensor) -> Tensor:
            return torch.sparse_coo_tensor(
                touched.unsqueeze(0), rows, (self.num_slots, rows.shape[1]), is_coalesced=True
            )

        return sparse(sums[0]), None if sums[1] is None else sparse(sums[1])

    @torch.no_grad()
    @nvtx.annotate("GradientFactors.grad_norm")
    def grad_norm(self) -> Tensor:
        """The 2-norm of both gradients as one vector: a scalar on the device, in the accumulation
        dtype. Nothing waits for the device, and no gradient table is made.

        Exact: the entries of a row are summed before they are squared. ``optim.clip_grad_norm_``
        counts the same with the gradients of a network, of parameters that are trained alone, and
        with what scaled them before.
        """
        grouping = torch.ops.ultramem.table_group(self.slots, self.num_slots)
        gradients = [(self.weights, self.groups, self.grad_outs)]
        grad_a, pre_inputs = self.grad_a, self.pre_inputs
        if grad_a is not None and pre_inputs is not None:
            gradients.append((grad_a[:, None], None, pre_inputs[:, None]))
        squares = [
            torch.ops.ultramem.table_grad_sum_sq(
                *grouping, *gradient, self.num_selected, self.num_slots
            )
            for gradient in gradients
        ]
        return torch.stack(squares).sum().sqrt().to(self.accumulation_dtype)

    @torch.no_grad()
    def _sum(self, rows: Tensor, num_rows: int) -> tuple[Tensor, Tensor | None]:
        """Both gradients, with entry e added to row rows[e], or to none where that is too large."""
        options: dict[str, Any] = {"dtype": self.accumulation_dtype, "device": self.device}
        values = torch.zeros(num_rows, self.value_dim, **options)
        pre_values: Tensor | None = None
        grad_a, pre_inputs = self.grad_a, self.pre_inputs
        if pre_inputs is not None:
            pre_values = torch.zeros(num_rows, self.pre_value_dim, **options)
        if rows.numel() == 0:
            return values, pre_values
        weights, groups, grad_outs = self.weights, self.groups, self.grad_outs
        for begin in range(0, rows.numel(), _ENTRIES_AT_ONCE):
            entries = torch.arange(
                begin, min(begin + _ENTRIES_AT_ONCE, rows.numel()), device=self.device
            )
            entries = entries[rows[entries] < num_rows]
            tokens = entries // self.num_selected
            group = torch.zeros_like(entries) if groups is None else groups[entries].long()
            terms = grad_outs[tokens, group].to(self.accumulation_dtype)
            terms = weights[entries].unsqueeze(2) * terms.unflatten(1, (weights.shape[1], -1))
            values.index_add_(0, rows[entries], terms.flatten(1))
            if pre_values is not None and grad_a is not None and pre_inputs is not None:
                terms = grad_a[entries].unsqueeze(1) * pre_inputs[tokens]
                pre_values.index_add_(0, rows[entries], terms)
        return values, pre_values

    # ---- copies --------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        dropped = ("_arena", "_gathered", "_lock", "_strangers", "_stream", "step_cache")
        return {name: value for name, value in self.__dict__.items() if name not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # It follows the table to its device at the first use.
        self._start_empty(torch.device("cpu"))

    def __repr__(self) -> str:
        shape = "no shape yet" if self._shape is None else str(self._shape)
        return f"GradientFactors({shape}, capacity={self.capacity}, nbytes={self.nbytes})"


def owner_of(arena: Tensor) -> GradientFactors | None:
    """The factors whose arena this is; None where nobody keeps them, and in compiled code."""
    reference: Callable[[], GradientFactors | None] | None = getattr(
        arena, "_ultramem_factors", None
    )
    return None if reference is None else reference()
