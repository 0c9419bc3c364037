"""Mixtures of experts of installed packages: on our layer's weights, compared before being timed.

Each has a builder below, which names what of the package is called. A package that is not installed
is left out; :func:`installed_moe_packages` says so in a sentence.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .moe_dispatch import DroplessMoE

__all__ = ["PackagedMoE", "installed_moe_packages", "packaged_moe"]

Forward = Callable[[Tensor], Tensor]

# Relative L2 distance of the outputs. In 16 bits a package may round weights and products
# differently, and a tie between two experts' logits may fall the other way.
_AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-4}
_AGREEMENT_16 = 3e-2


@dataclass(frozen=True)
class PackagedMoE:
    """A package's dropless mixture of experts."""

    package: str
    version: str
    build: Callable[[DroplessMoE], Forward]
    """A layer on the very parameters of ours; it takes x [T, D]."""

    @property
    def title(self) -> str:
        return f"{self.package} {self.version}"


def _transformers_olmoe(moe: DroplessMoE) -> Forward:
    """Hugging Face's block of OLMoE, its experts multiplied by ``grouped_mm``."""
    olmoe = importlib.import_module("transformers.models.olmoe.modeling_olmoe")
    configuration = importlib.import_module("transformers.models.olmoe.configuration_olmoe")
    config = configuration.OlmoeConfig(
        hidden_size=moe.d_model,
        intermediate_size=moe.inner,
        num_experts=moe.num_experts,
        num_experts_per_tok=moe.experts_per_token,
        norm_topk_prob=moe.normalize,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        block = olmoe.OlmoeSparseMoeBlock(config)
    block.gate.weight = moe.router
    block.experts.gate_up_proj = moe.gate_up
    block.experts.down_proj = moe.down
    return lambda x: block(x[None])[0]


def _scattermoe_glu(moe: DroplessMoE) -> Forward:
    """ScatterMoE's experts behind our router. Its halves stand the other way round, so that it
    holds a copy of ``gate_up``: gradients reach that copy."""
    mlp = importlib.import_module("scattermoe.mlp")
    with torch.device("meta"):
        block = mlp.GLUMLP(moe.d_model, moe.inner, moe.num_experts, moe.experts_per_token)
    gate, up = moe.gate_up.detach().chunk(2, dim=1)
    block.experts.weight = nn.Parameter(torch.cat([up, gate], dim=1))
    block.output_experts.weight = moe.down

    def forward(x: Tensor) -> Tensor:
        weights, experts = moe.route(x)
        return block(x, weights.to(x.dtype), experts)

    return forward


_BUILDERS = {"transformers": _transformers_olmoe, "scattermoe": _scattermoe_glu}


def installed_moe_packages() -> tuple[list[PackagedMoE], list[str]]:
    """Packages with a dropless mixture of experts, and a sentence about those that are missing."""
    found = []
    for package, build in _BUILDERS.items():
        if importlib.util.find_spec(package) is None:
            continue
        version = "of unknown version"
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(package)
        found.append(PackagedMoE(package, version, build))
    missing = sorted(set(_BUILDERS) - {moe.package for moe in found})
    notes = [f"not compared, because not installed: the MoE of {', '.join(missing)}"]
    return found, notes if missing else []


def packaged_moe(package: PackagedMoE, moe: DroplessMoE, x: Tensor) -> Forward:
    """The package's layer with the weights of ``moe``, once its output has been found to agree.

    Args:
        x: [T, D], not empty: the tokens on which the outputs are compared.

    Raises:
        RuntimeError: a sentence that says why it cannot be compared.
    """
    try:
        forward = package.build(moe)
        with torch.no_grad():
            theirs, ours = forward(x), moe(x)
    except Exception as error:  # a package of another version may fail in any way
        reason = f"{type(error).__name__}: {error}"
        raise RuntimeError(f"{package.title} could not be run: {reason}") from error
    if theirs.shape != ours.shape:
        raise RuntimeError(
            f"{package.title} returns {list(theirs.shape)} where ours is {list(ours.shape)}"
        )
    distance = float((theirs.double() - ours.double()).norm() / ours.double().norm())
    if not distance <= _AGREEMENT.get(x.dtype, _AGREEMENT_16):
        raise RuntimeError(
            f"{package.title} computes something else: relative distance {distance:.1e} from ours"
        )
    return forward
