"""The memory layer of a transformer block (UltraMemV2, sections 3.2-3.5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import nvtx, ops
from ._retrieval_cache import CachedCores, CachedRetrieval, is_capturing
from .addressing import SlotAddressing
from .config import UltraMemConfig
from .init import initialize_layer
from .losses import tucker_penalty
from .ops._checks import accumulation_dtype
from .stats import KeyUsage, SlotUsage
from .table import MemoryTable


class UltraMemLayer(nn.Module):
    """Product-key memory with Tucker-decomposed scores and FFN-valued slots.

    It runs beside the block's FFN, on the same normed input::

        x = x + ffn(norm(x)) + memory(norm(x), table)

    Parameters and modules: ``query_proj`` (weight [2*H*Q*Kd, D], rows ordered side, head, rank,
    Kd), ``query_norm`` [Kd], ``keys`` [H, 2, R, n, Kd], ``key_norm`` [Kd], ``cores`` [C, H, R, R]
    (None in additive mode), ``pre_proj`` (weight [Dp, D], None without pre-values), ``value_proj``
    (weight [D, Dv], or [D, E*Dv] without summed groups).

    In eval mode without gradients, normalised keys and the filter are cached. The cache follows
    changes of the parameters made by ordinary tensor operations, optimizers, ``load_state_dict``,
    ``train()`` and moves. Writes that advance no version counter escape it (through ``param.data``,
    NumPy, DLPack, a flat buffer that the parameters are views of): call :meth:`refresh_cache` after
    those. Compiled code does not use the cache.

    A captured CUDA graph reads the cache as it is at replay: after changing parameters call
    :meth:`refresh_cache`, which writes to the same memory. That memory stays until the parameters
    change device or dtype; a graph captured before such a move must be captured again. Streams may
    share the cache: reads wait for the fill, and a refill for what the streams that have read it
    hold by then. Not seen, and so to be ordered by the caller (as ``torch.cuda.graph`` does by
    synchronising before capture): replays of graphs, which must run after the fill and not beside
    a refill; and, as everywhere, writes to parameters on other streams. Host threads that may fill
    the cache must not run the same layer at once.

    Attributes:
        addressing: how the layer's virtual indices map to rows of the table.
        usage: a :class:`~ultramem_cuda.stats.SlotUsage` that counts slots, or None (the default,
            free).
        key_usage: a :class:`~ultramem_cuda.stats.KeyUsage` that counts the keys kept on each axis,
            or None (the default, free).
        last_losses: weighted auxiliary losses of the last forward pass in training mode, by name
            ("tucker_penalty", "key_balance"); empty while they are off. They hold the graph of
            that pass, which reentrant activation checkpointing does not record.
            :func:`~ultramem_cuda.losses.collect_aux_losses` sums them over layers.

    Args:
        config: shapes and options.
        layer_index: which of ``config.num_layers`` memory layers this is; it sets the window and
            the shuffle.
        permutation: int64 [E * window], the shuffle to use with ``config.shuffle="permutation"``;
            random by default. It is copied to the buffer ``shuffle_index``, which is part of the
            state dict.
    """

    query_norm: nn.Parameter
    keys: nn.Parameter
    key_norm: nn.Parameter
    cores: nn.Parameter | None
    pre_proj: nn.Linear | None
    shuffle_index: Tensor | None
    _placement: Tensor

    def __init__(
        self,
        config: UltraMemConfig,
        layer_index: int,
        *,
        permutation: Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_index = layer_index
        window, offset = config.layer_window(layer_index)
        if permutation is not None and config.shuffle != "permutation":
            raise ValueError(
                "permutation: must be None unless config.shuffle is 'permutation', "
                f"which is {config.shuffle!r}"
            )
        self._window = (window, offset)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

        def linear(fan_in: int, fan_out: int) -> nn.Linear:
            return nn.Linear(fan_in, fan_out, bias=False, dtype=dtype, device=device)

        c = config
        query_dim = 2 * c.num_heads * c.num_queries * c.key_dim
        self.query_proj = linear(c.d_model, query_dim)
        self.query_norm = parameter(c.key_dim)
        self.keys = parameter(c.num_heads, 2, c.tucker_rank, c.num_keys, c.key_dim)
        self.key_norm = parameter(c.key_dim)
        if c.mode == "tucker":
            self.cores = parameter(c.num_cores, c.num_heads, c.tucker_rank, c.tucker_rank)
        else:
            self.register_parameter("cores", None)
        self.pre_proj = linear(c.d_model, c.pre_value_dim) if c.pre_value_dim else None
        self.value_proj = linear(c.output_groups * c.value_dim, c.d_model)
        self._init_addressing(permutation)
        self.usage: SlotUsage | None = None
        self.key_usage: KeyUsage | None = None
        self.last_losses: dict[str, Tensor] = {}
        self._cache: dict[torch.dtype, CachedRetrieval] = {}
        self.reset_parameters()

    def _init_addressing(self, permutation: Tensor | None) -> None:
        config, (window, offset) = self.config, self._window
        shuffle: str | Tensor | None = None if config.shuffle == "none" else config.shuffle
        self.register_buffer("shuffle_index", None)
        self._random_permutation = config.shuffle == "permutation" and permutation is None
        if config.shuffle == "permutation":
            content = self._draw_permutation() if permutation is None else permutation.detach()
            shuffle = self.shuffle_index = content.clone().to(self.keys.device)
        seed = self._shuffle_seed if shuffle == "feistel" else 0
        self.addressing = SlotAddressing(
            config.num_slots, window, offset, config.expand, shuffle, seed
        )
        # For compiled code, see _addressed.
        self._whole_table = SlotAddressing(config.num_slots, config.num_slots, 0, config.expand)
        self.register_buffer("_placement", None, persistent=False)
        self._place()

    def _draw_permutation(self) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(self._shuffle_seed)
        virtual = self.config.expand * self.config.window
        return torch.randperm(virtual, generator=generator, device="cpu")

    @property
    def _shuffle_seed(self) -> int:
        return self.config.seed * (1 << 16) + self.layer_index

    def reset_parameters(self) -> None:
        """Draw all parameters as ``config.init`` says, with torch's default generator.

        A random permutation depends on the configuration's seed alone and is written again.
        """
        initialize_layer(self)
        if self._random_permutation and self.shuffle_index is not None:
            self.shuffle_index.copy_(self._draw_permutation())
        self._invalidate_cache()

    @nvtx.annotate("UltraMemLayer fwd")
    def forward(self, x: Tensor, table: MemoryTable) -> Tensor:
        """Memory output for each token.

        Args:
            x: [..., D], of the parameters' dtype unless autocast is on.
            table: the model's table; its rows may have a dtype of their own.

        Returns:
            [..., D], of x's dtype (under autocast, of autocast's).
        """
        tokens = self.flat_tokens(x, table)
        # First, so that its backward comes last: then no gradient of x as large as a query is held
        # while those of the queries are made.
        pre_input = self.pre_input(tokens)
        scores, indices = self.retrieve(tokens)
        return self.value_proj(self.read(table, scores, indices, pre_input)).reshape(x.shape)

    def flat_tokens(self, x: Tensor, table: MemoryTable) -> Tensor:
        """x as [T, D], once it and the table are known to fit.

        The first step of :meth:`forward`, as which it and the following are there for code that
        puts other work between or beside them: pre_input, retrieve, read, ``value_proj``.
        """
        if x.shape[-1] != self.config.d_model:
            raise ValueError(
                f"x: last dimension must be d_model = {self.config.d_model}, "
                f"got shape {list(x.shape)}"
            )
        if not hasattr(table, "check_matches"):
            raise TypeError(f"table: must be a MemoryTable, got {type(table).__name__}")
        table.check_matches(self.config)
        return x.reshape(-1, self.config.d_model)

    def pre_input(self, tokens: Tensor) -> Tensor | None:
        """tokens [T, D] projected to what pre-values are multiplied with, [T, Dp], if any."""
        return None if self.pre_proj is None else self.pre_proj(tokens)

    def retrieve(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The slots of each token [T, D]: scores [T, H*M, C], virtual indices [T, H*M]."""
        return self.retrieve_for(self.query(tokens))

    def query(self, tokens: Tensor) -> Tensor:
        """The first half of :meth:`retrieve`: what the keys are multiplied with,
        [T, 2, H, Q, Kd]."""
        return ops.tucker_query(
            tokens,
            self.query_proj.weight,
            self.query_norm,
            num_heads=self.config.num_heads,
            eps=self.config.eps,
        )

    def retrieve_for(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """The second half of :meth:`retrieve`."""
        scores, indices = self._retrieve(query)
        return scores.flatten(1, 2), indices.flatten(1)

    def read(
        self, table: MemoryTable, scores: Tensor, indices: Tensor, pre_input: Tensor | None
    ) -> Tensor:
        """What :meth:`retrieve` has found, weighed and summed: [T, Dv], or [T, E*Dv] without
        summed groups."""
        if self.usage is not None:
            self.usage.update(indices)
        options: dict[str, Any] = {
            "activation": self.config.activation,
            "sum_groups": self.config.sum_groups,
        }
        if table.sharding is not None and table.sharding.by is not None:
            options["addressing"] = self.addressing
            out = table.sharding.read(table, indices, scores, pre_input, **options)
        else:
            indices, options["addressing"] = self._addressed(indices)
            out = ops.value_ffn(
                indices,
                scores,
                table.values,
                table.pre_values,
                pre_input,
                table_scale=table.scale,
                factors=table.factors,
                **options,
            )
        out = out.flatten(1)
        # Without pre-values the rows' dtype comes out, which need not be that of the network.
        return out if pre_input is not None else out.to(self.query_proj.weight.dtype)

    def _addressed(self, indices: Tensor) -> tuple[Tensor, SlotAddressing | None]:
        """Virtual indices and the addressing that value_ffn is to apply to them.

        The operator takes offset and seed as numbers. In code that is compiled block by block they
        would be constants, and every layer a compilation of its own; so the rows are found before,
        from a tensor. What is exported holds each layer anyway and has the numbers.
        """
        if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return indices, self.addressing
        with_groups = not self.config.sum_groups
        slots = ops.value_slots(
            indices, self._placement, addressing=self.addressing, with_groups=with_groups
        )
        return slots, self._whole_table if with_groups else None

    def _place(self) -> None:
        """Have the placement where the layer is. Made anew: a move may have left it undefined
        (``to_empty``)."""
        self._placement = self.addressing.placement(self.keys.device)

    def _retrieve(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [T, H, M, C] and virtual indices [T, H, M] of the kept slots.

        Leaves behind, where they are wanted, losses and counts of the kept keys.
        """
        config = self.config
        keys: Tensor = self.keys
        key_norm: Tensor | None = self.key_norm
        cores: Tensor | None = self.cores
        u = t = sigma = None
        cached = self._cached_retrieval(query)
        with_losses = self.training and bool(config.tucker_penalty or config.key_balance)
        if cached is not None:
            keys, key_norm = cached.keys, None
            if cached.tucker is not None:
                cores, u, t = cached.tucker
        elif with_losses:
            # What the operator would make inside, made once for it and the losses.
            keys = ops.rms_norm(keys.to(query.dtype), self.key_norm, eps=config.eps)
            key_norm = None
            if self.cores is not None:
                u, t, sigma = ops.tucker_filter(self.cores)
        scores, indices, axis_indices = ops.product_key_topk(
            query,
            keys,
            cores,
            topk=config.topk,
            axis_topk=config.kept_per_axis,
            u=u,
            t=t,
            key_norm_weight=key_norm,
            eps=config.eps,
            mode=config.mode,
            return_axis_indices=True,
        )
        if with_losses:
            self.last_losses = self._aux_losses(query, keys, axis_indices, u, t, sigma)
        if self.key_usage is not None:
            self.key_usage.update(axis_indices)
        if config.score_norm == "softmax":
            scores = scores.softmax(2)
        return scores, indices

    def _aux_losses(
        self,
        query: Tensor,
        keys: Tensor,
        axis_indices: Tensor,
        u: Tensor | None,
        t: Tensor | None,
        sigma: Tensor | None,
    ) -> dict[str, Tensor]:
        config = self.config
        losses: dict[str, Tensor] = {}
        if config.tucker_penalty and sigma is not None:
            penalty = tucker_penalty(sigma, margin=config.tucker_margin)
            losses["tucker_penalty"] = config.tucker_penalty * penalty
        if config.key_balance:
            balance = ops.key_balance_loss(
                query, keys, axis_indices, u=u, t=t, normalize=config.key_balance_normalize
            )
            losses["key_balance"] = config.key_balance * balance.sum()
        return losses

    def refresh_cache(self) -> None:
        """Recompute, in place, all that eval mode has cached.

        Runs on the current stream; order replays of captured graphs on other streams after it. What
        a move to another device or dtype has dropped is not made again: graphs that read it must be
        captured again.

        Raises:
            RuntimeError: on a stream that is capturing a CUDA graph.
        """
        if is_capturing(self.keys.device):
            raise RuntimeError("refresh_cache: must not be called while a CUDA graph is captured")
        for dtype in self._cache:
            self._fill_cache(dtype)

    def _cached_retrieval(self, query: Tensor) -> CachedRetrieval | None:
        """The cache, brought up to date, or None where it must not be used."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        parameters = self._cache_parameters()
        # Swapped-in tensors and parameters of tensor subclasses or inference mode have no version
        # to follow.
        if not all(type(p) is nn.Parameter and not p.is_inference() for p in parameters):
            return None
        entry = self._cache.get(query.dtype)
        if entry is not None and entry.is_current(parameters):
            entry.order.before_read()
            return entry
        if is_capturing(query.device):
            # Capture does not execute: what it would leave in the cache is not computed before the
            # first replay.
            return None
        return self._fill_cache(query.dtype)

    def _cache_parameters(self) -> tuple[nn.Parameter, ...]:
        if self.cores is None:
            return self.keys, self.key_norm
        return self.keys, self.key_norm, self.cores

    def _cache_placement(self) -> list[tuple[torch.device, torch.dtype]]:
        return [(p.device, p.dtype) for p in self._cache_parameters()]

    def _fill_cache(self, dtype: torch.dtype) -> CachedRetrieval:
        # Ordinary tensors, also under inference_mode: they are written again in place.
        with torch.inference_mode(False), torch.no_grad():
            keys = ops.rms_norm(self.keys.to(dtype), self.key_norm, eps=self.config.eps)
            tucker = None
            if self.cores is not None:
                used = self.cores.detach().to(accumulation_dtype(dtype), copy=True)
                tucker = CachedCores(used, *ops.tucker_filter(self.cores)[:2])
            made = CachedRetrieval(keys, tucker)
            entry = self._cache.get(dtype)
            if entry is None or not entry.fits(made):
                entry = self._cache[dtype] = made
            else:
                entry.update(made)
            entry.stamp(self._cache_parameters())
        return entry

    def _invalidate_cache(self) -> None:
        for entry in self._cache.values():
            entry.invalidate()

    def train(self, mode: bool = True) -> UltraMemLayer:
        self._invalidate_cache()
        self.last_losses = {}
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> UltraMemLayer:
        before = self._cache_placement()
        super()._apply(fn, recurse)
        if self._cache_placement() == before:
            # A move to where the layer already is must not free what captured graphs read.
            self._invalidate_cache()
        else:
            self._cache.clear()
        if self.shuffle_index is not None:
            self.addressing = self.addressing._with_permutation(self.shuffle_index)
        self._place()
        return self

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        self._invalidate_cache()
        if self._placement.device != self.keys.device:  # as assign=True may have it
            self._place()
        if self.shuffle_index is not None:
            window, offset = self._window
            try:
                self.addressing = SlotAddressing(
                    self.config.num_slots, window, offset, self.config.expand, self.shuffle_index
                )
            except (TypeError, ValueError) as error:
                error_msgs: list[str] = args[-1]
                error_msgs.append(f"{prefix}shuffle_index: {error}")

    def __getstate__(self) -> dict[str, Any]:
        # Neither belongs in a copy or a pickle: the cache is recomputed, losses hold a graph.
        return {**self.__dict__, "_cache": {}, "last_losses": {}}

    def extra_repr(self) -> str:
        window, offset = self._window
        return (
            f"layer_index={self.layer_index}, window={window}, offset={offset}, "
            f"mode={self.config.mode!r}"
        )
