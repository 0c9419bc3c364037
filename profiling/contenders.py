"""The subjects of a preset as layers that run, and those of them that are compared, together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .instruments import Instruments
from .moe_dispatch import DroplessMoE
from .moe_packages import Forward, PackagedMoE, packaged_moe
from .presets import Case, ProfilePreset
from .subjects import Runnable, make_block, make_ffn, make_memory, make_moe
from .traffic import DenseFFN, Layer, Layers, MemoryLayer, MoEFFN

__all__ = ["Contender", "NotMeasurable", "groups", "make_contender", "package_case"]

# Of a package's layers, each with the weights of one of ours.
_PACKAGED_LAYERS = 4
_COMPARED_TOKENS = 64


class NotMeasurable(Exception):
    """A subject that cannot be run on this machine as it has to be; a sentence."""


@dataclass
class Contender:
    """A subject, ready to run."""

    name: str
    layer: Layer
    """The byte model."""
    runnable: Runnable

    @property
    def num_layers(self) -> int:
        return len(self.runnable.layers)

    @property
    def dense_bytes(self) -> float:
        """Bytes that a token of every layer goes through, one layer after the other."""
        moved = self.layer.traffic("decode", 1).parameters
        return self.num_layers * (moved.dense + moved.gathered)

    def keep_layers(self, count: int) -> None:
        """Frees all layers but the first ones."""
        self.runnable.layers = self.runnable.layers[:count]


def groups(preset: ProfilePreset) -> list[list[Case]]:
    """Subjects that are measured in turns: those that are compared, directly or through others.

    What is compared with nothing is measured with the first.
    """
    group_of = {case.name: index for index, case in enumerate(preset.cases)}
    for ours, other in preset.comparisons:
        joined, into = group_of[other], group_of[ours]
        group_of = {name: into if group == joined else group for name, group in group_of.items()}
    compared = {name: group_of[name] for pair in preset.comparisons for name in pair}
    found: dict[int, list[Case]] = {group: [] for group in compared.values()}
    first = next(iter(found), 0)
    for case in preset.cases:
        found.setdefault(compared.get(case.name, first), []).append(case)
    return list(found.values())


def make_contender(case: Case, preset: ProfilePreset, instruments: Instruments) -> Contender:
    """As many layers as the model has, or as the memory for experts holds.

    Raises:
        NotMeasurable: a mixture of experts that waits for the host.
        torch.OutOfMemoryError: it does not fit.
    """
    layer, name = case.layer, case.name
    options: dict[str, Any] = {
        "name": name,
        "layers": _num_layers(layer, preset, instruments),
        "dtype": instruments.dtype,
        "device": instruments.device,
    }
    if isinstance(layer, MemoryLayer):
        return Contender(name, layer, make_memory(layer.config, **options))
    options["compiled"] = None if instruments.compiled else False
    if isinstance(layer, DenseFFN):
        return Contender(name, layer, make_ffn(layer.d_model, layer.inner, **options))
    if isinstance(layer, MoEFFN):
        sizes = (layer.d_model, layer.inner, layer.num_experts, layer.experts_per_token)
        runnable = make_moe(*sizes, **options)
        _check_products(runnable, instruments.device)
        return Contender(name, layer, runnable)
    assert isinstance(layer, Layers)
    ffn, memory = layer.parts
    assert isinstance(ffn, DenseFFN)
    assert isinstance(memory, MemoryLayer)
    return Contender(name, layer, make_block(memory.config, ffn.inner, **options))


def _num_layers(layer: Layer, preset: ProfilePreset, instruments: Instruments) -> int:
    if not isinstance(layer, MoEFFN):
        return preset.config.num_layers
    fitting = instruments.weights_bytes // (layer.total_parameters() * instruments.dtype.itemsize)
    return min(preset.config.num_layers, max(1, fitting))


def _check_products(runnable: Runnable, device: torch.device) -> None:
    (first, *_) = runnable.layers
    assert isinstance(first, DroplessMoE)
    if device.type == "cuda" and first.products != "grouped_mm":
        raise NotMeasurable(
            "torch has no grouped product for this GPU that does not wait for the host, so that no "
            "CUDA graph can hold the mixture of experts"
        )


class _PackagedRunnable(Runnable):
    """Layers of ours, computed by a package."""

    def __init__(self, name: str, layers: nn.ModuleList, forwards: Sequence[Forward]) -> None:
        super().__init__(name, layers)
        self._forwards = forwards

    def _call(self, layer: int, x: Tensor) -> Tensor:
        return self._forwards[layer](x)


def package_case(package: PackagedMoE, moe: Case) -> Case:
    """A package's layer as a subject of its own, with the sizes of ours."""
    detail = f"the weights of {moe.title}, computed by {package.title}; decode alone"
    return Case(
        f"{moe.name}-{package.package}", f"MoE of {package.title}", "moe", moe.layer, detail
    )


def packaged_contender(
    package: PackagedMoE, case: Case, ours: Contender, device: torch.device
) -> Contender:
    """The package's layers on the weights of ``ours``, once their outputs agree.

    Raises:
        NotMeasurable: they do not, it fails, or it waits for the host, as no CUDA graph may.
    """
    layers = ours.runnable.layers[:_PACKAGED_LAYERS]
    (like, *_) = layers.parameters()
    x = torch.randn(_COMPARED_TOKENS, like.shape[-1]).to(device, like.dtype)
    try:
        forwards = []
        for module in layers:
            assert isinstance(module, DroplessMoE)
            forwards.append(packaged_moe(package, module, x))
        runnable = _PackagedRunnable(case.name, layers, forwards)
        if device.type == "cuda":
            _check_asynchronous(runnable, x)
    except RuntimeError as error:
        raise NotMeasurable(str(error)) from error
    return Contender(case.name, case.layer, runnable)


def _check_asynchronous(runnable: Runnable, x: Tensor) -> None:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        runnable.forward(0, x)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise NotMeasurable(f"it waits for the host: {reason}") from error
    finally:
        torch.cuda.set_sync_debug_mode(before)
