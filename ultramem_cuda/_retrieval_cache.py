"""What a layer caches in eval mode, and how it knows that its parameters have changed."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class _OptimizerSteps:
    """Counts the steps of all of torch's optimizers, once watched.

    Their fused kernels write parameters without advancing the version counters.
    """

    def __init__(self) -> None:
        self.count = 0
        self._watched = False

    def watch(self) -> None:
        if not self._watched:
            register_optimizer_step_post_hook(self._advance)
            self._watched = True

    def _advance(self, *_: Any) -> None:
        self.count += 1


_optimizer_steps = _OptimizerSteps()


@dataclasses.dataclass
class CachedRetrieval:
    """Normalised keys [H, 2, R, n, Kd] and the filter (u, t), and the parameters they came from.

    ``sources`` are detached aliases: they share version counters with the parameters and keep their
    storage from being reused at the same address, so that identity, address and version together
    tell every replacement from the original.
    """

    keys: Tensor
    filter: tuple[Tensor, Tensor] | None
    parameters: tuple[nn.Parameter, ...] = ()
    sources: tuple[Tensor, ...] = ()
    versions: tuple[int, ...] = ()
    optimizer_steps: int = 0

    def is_current(self, parameters: tuple[nn.Parameter, ...]) -> bool:
        """Whether nothing has changed ``parameters`` since :meth:`stamp`."""
        if (
            len(parameters) != len(self.parameters)
            or self.optimizer_steps != _optimizer_steps.count
        ):
            return False
        stamped = zip(parameters, self.parameters, self.sources, self.versions, strict=True)
        return all(
            now is then and now.data_ptr() == source.data_ptr() and now._version == version
            for now, then, source, version in stamped
        )

    def stamp(self, parameters: tuple[nn.Parameter, ...]) -> None:
        """Record what the entry was computed from."""
        _optimizer_steps.watch()
        self.parameters = parameters
        self.sources = tuple(p.detach() for p in parameters)
        self.versions = tuple(p._version for p in parameters)
        self.optimizer_steps = _optimizer_steps.count

    def invalidate(self) -> None:
        """Forget the parameters but keep the memory, which a captured graph may still read."""
        self.parameters = self.sources = self.versions = ()

    def update(self, keys: Tensor, filter_: tuple[Tensor, Tensor] | None) -> None:
        """Write new content to the same memory: captured graphs hold its addresses."""
        self.keys.copy_(keys)
        if self.filter is not None and filter_ is not None:
            self.filter[0].copy_(filter_[0])
            self.filter[1].copy_(filter_[1])
