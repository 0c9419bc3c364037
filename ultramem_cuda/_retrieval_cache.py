"""What a layer caches in eval mode, and how it knows that its parameters have changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import _library


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


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of ``device`` is capturing a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def capture_id(device: torch.device) -> int:
    """Of the CUDA graph that the current stream of ``device`` is capturing: a number that no other
    capture of the process has, 0 where there is none."""
    if not is_capturing(device):
        return 0
    return _library.capture_id(torch.cuda.current_stream(device).cuda_stream)


class StreamOrder:
    """Orders the CUDA streams that fill and read some tensors; elsewhere it has nothing to do."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._device = tensors[0].device
        self._on_cuda = self._device.type == "cuda"
        self._fill: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None
        # Streams that have used the content since, and in, the last fill.
        self._users: set[torch.cuda.Stream] = set()

    def before_fill(self) -> None:
        """Let the current stream wait for the last fill and all reads of its content."""
        if not self._on_cuda:
            return
        stream = torch.cuda.current_stream(self._device)
        for user in self._users - {stream}:
            stream.wait_stream(user)
        self._keep_for(stream)

    def after_fill(self) -> None:
        """Note that the current stream has filled the tensors."""
        if not self._on_cuda:
            return
        stream = torch.cuda.current_stream(self._device)
        self._fill = stream, stream.record_event()
        self._users = {stream}

    def before_read(self) -> None:
        """Let the current stream wait for the last fill.

        A stream that is capturing cannot wait for what the capture does not hold: whoever replays
        the graph orders it.
        """
        if self._fill is None:
            return
        stream = torch.cuda.current_stream(self._device)
        filler, filled = self._fill
        if stream == filler or is_capturing(self._device):
            return
        stream.wait_event(filled)
        self._keep_for(stream)
        self._users.add(stream)

    def _keep_for(self, stream: torch.cuda.Stream) -> None:
        """Keep memory that is freed from being reused before ``stream`` is done with it."""
        for tensor in self._tensors:
            tensor.record_stream(stream)


class CachedCores(NamedTuple):
    """The cores [C, H, R, R] in the dtype they are used in, and their filter [H, R]."""

    cores: Tensor
    u: Tensor
    t: Tensor


@dataclasses.dataclass
class CachedRetrieval:
    """Normalised keys [H, 2, R, n, Kd] and what is made of the cores, and the parameters they came
    from.

    ``sources`` are detached aliases: they share version counters with the parameters and keep their
    storage from being reused at the same address, so that identity, address and version together
    tell every replacement from the original.
    """

    keys: Tensor
    tucker: CachedCores | None
    parameters: tuple[nn.Parameter, ...] = ()
    sources: tuple[Tensor, ...] = ()
    versions: tuple[int, ...] = ()
    optimizer_steps: int = 0
    order: StreamOrder = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.order = StreamOrder(self.tensors)
        self.order.after_fill()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.keys, *(self.tucker or ()))

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

    def fits(self, other: CachedRetrieval) -> bool:
        """Whether :meth:`update` can take the other's content as it is."""
        mine, theirs = (
            [(x.device, x.dtype, x.shape) for x in entry.tensors] for entry in (self, other)
        )
        return mine == theirs

    def update(self, other: CachedRetrieval) -> None:
        """Write the other's content to the same memory: captured graphs hold its addresses."""
        self.order.before_fill()
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            mine.copy_(theirs)
        self.order.after_fill()
