"""The layers that a profile compares: UltraMemV2 at its published sizes, and peers matched to it.

All sizes follow from ``UltraMemConfig.preset`` and the two rules here: what is compared at equal
parameters has equal *active* parameters (those that a token uses) and, where that can be, equal
*total* ones, of the table those of one layer's share. ``analysis.matching`` says how nearly. The
configurations are the shapes S ("227M-1.2B") and M ("1B-7B") of ``bench/shapes.py``, from which
they differ in nothing but that they name no number of tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from ultramem_cuda import UltraMemConfig

from . import record
from .traffic import DenseFFN, Layer, MemoryLayer, MoEFFN, PKMLayer

NAMES = ("227M-1.2B", "1B-7B")
DECODE_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
TRAINING_TOKENS = (1024, 4096, 8192, 16384, 65536)

ACTIVE_TOLERANCE = 0.02
TOTAL_TOLERANCE = 0.10
# A token uses 8 of 64 experts, as in OLMoE-1B-7B (arXiv 2409.02060), whose width is 2048.
EXPERTS = 64
EXPERTS_PER_TOKEN = 8
OLMOE_WIDTH = 2048
OLMOE_INNER = 1024
# Of an expert's inner width: a tile of tensor cores; and 16 bytes of bfloat16, the least that
# grouped products take.
INNER_STEP = 16
FINE_INNER_STEP = 8


@dataclass(frozen=True)
class Case:
    """A subject of a profile with its traffic model, which holds all of its sizes.

    ``layer`` is a :class:`MemoryLayer` or :class:`PKMLayer` (``config``), a :class:`DenseFFN`
    (``d_model``, ``inner``), a :class:`MoEFFN` (``inner``, ``num_experts``,
    ``experts_per_token``), or :class:`Layers` of them, side by side on the same tokens (``parts``).
    """

    name: str
    title: str
    kind: record.Kind
    layer: Layer
    detail: str

    @property
    def subject(self) -> record.Subject:
        """As the record has it."""
        return record.Subject(
            name=self.name,
            title=self.title,
            kind=self.kind,
            active_parameters=self.layer.active_parameters(),
            total_parameters=self.layer.total_parameters(),
            detail=self.detail,
        )


@dataclass(frozen=True)
class ProfilePreset:
    """Subjects of one model size, and which of them are compared."""

    config: UltraMemConfig
    name: str
    cases: tuple[Case, ...]
    comparisons: Sequence[tuple[str, str]]
    """Pairs of names, ours first."""

    def __getitem__(self, name: str) -> Case:
        for case in self.cases:
            if case.name == name:
                return case
        names = ", ".join(case.name for case in self.cases)
        raise KeyError(f"{name!r} is none of the subjects of {self.name}: {names}")

    def record(self) -> record.Preset:
        """As the record has it."""
        subjects = tuple(case.subject for case in self.cases)
        return record.Preset(self.name, self.config.d_model, subjects, self.comparisons)


@cache
def profile_preset(name: str) -> ProfilePreset:
    """The subjects of "227M-1.2B" (d_model 768) or "1B-7B" (2048).

    =============  =============================================================================
    memory         the memory layer alone
    ffn            the dense SwiGLU beside it
    block          both: what a block has in place of a mixture of experts
    moe            8 of 64 experts: at width 2048 those of OLMoE-1B-7B, at 768 matched to the
                   block's active parameters
    moe-matched    at width 2048: 8 of 64 experts, matched to the block's active parameters
    moe-fine       8 of many small experts, matched to the memory layer alone, active and total
    pkm            product-key memory of the memory layer's active and total parameters
    =============  =============================================================================

    Raises:
        ValueError: another name.
    """
    if name not in NAMES:
        raise ValueError(f"name: must be one of {', '.join(NAMES)}, got {name!r}")
    config = UltraMemConfig.preset(name)
    if config.ffn_inner_dim is None:
        raise ValueError(f"{name}: the configuration names no FFN")
    memory, ffn = MemoryLayer(config), DenseFFN(config.d_model, config.ffn_inner_dim)
    block = ffn + memory
    cases = [
        Case("memory", "memory layer", "memory", memory, _memory_detail(config)),
        Case("ffn", "FFN", "ffn", ffn, f"SwiGLU, inner width {ffn.inner}"),
        Case(
            "block",
            "FFN + memory layer",
            "block",
            block,
            f"SwiGLU of inner width {ffn.inner} beside the memory layer",
        ),
        *_moe_cases(config.d_model, block),
        _fine_case(memory),
        _pkm_case(config),
    ]
    compared = {"block": ("moe", "moe-matched"), "memory": ("moe-fine", "pkm")}
    names = {case.name for case in cases}
    comparisons = [(a, b) for a, others in compared.items() for b in others if b in names]
    return ProfilePreset(config, name, tuple(cases), tuple(comparisons))


def _memory_detail(config: UltraMemConfig) -> str:
    return (
        f"{config.slots_per_token} of {config.window:,} slots, keys 2 x {config.num_keys} of "
        f"{config.key_dim}, rows {config.pre_value_dim} + {config.value_dim}; a table of "
        f"{config.num_slots:,} slots for {config.num_layers} layers"
    )


def _moe_cases(d_model: int, block: Layer) -> list[Case]:
    """8 of 64 experts: OLMoE's where that has the width, and matched ones."""
    matched = match_experts(d_model, block.active_parameters())
    detail = f"{_moe_detail(matched)}, of the block's active parameters"
    if d_model != OLMOE_WIDTH:
        return [Case("moe", "MoE", "moe", matched, detail)]
    olmoe = MoEFFN(d_model, OLMOE_INNER, EXPERTS, EXPERTS_PER_TOKEN)
    return [
        Case("moe", "OLMoE's MoE", "moe", olmoe, f"{_moe_detail(olmoe)}, as in OLMoE-1B-7B"),
        Case("moe-matched", "MoE, matched", "moe", matched, detail),
    ]


def _fine_case(memory: MemoryLayer) -> Case:
    fine = match_fine_experts(
        memory.config.d_model, memory.active_parameters(), memory.total_parameters()
    )
    detail = f"{_moe_detail(fine)}, of the memory layer's active and total parameters"
    return Case("moe-fine", "fine-grained MoE", "moe", fine, detail)


def _moe_detail(moe: MoEFFN) -> str:
    return f"{moe.experts_per_token} of {moe.num_experts} experts, inner width {moe.inner}"


def match_experts(d_model: int, active: int) -> MoEFFN:
    """8 of 64 experts whose width, a multiple of 16, comes nearest to the active parameters."""

    def of_width(inner: int) -> MoEFFN:
        return MoEFFN(d_model, inner, EXPERTS, EXPERTS_PER_TOKEN)

    exact = (active - d_model * EXPERTS) / (3 * d_model * EXPERTS_PER_TOKEN)
    below = max(int(exact) // INNER_STEP * INNER_STEP, INNER_STEP)
    return min(
        (of_width(below), of_width(below + INNER_STEP)),
        key=lambda moe: abs(moe.active_parameters() - active),
    )


def match_fine_experts(d_model: int, active: int, total: int) -> MoEFFN:
    """8 of any number of experts, matched in active and in total parameters.

    More experts make a larger router, which every token uses, so that width and number are chosen
    together: those that take up least of either tolerance. The width is a multiple of 8.
    """

    def miss(moe: MoEFFN) -> float:
        return max(
            abs(moe.active_parameters() / active - 1) / ACTIVE_TOLERANCE,
            abs(moe.total_parameters() / total - 1) / TOTAL_TOLERANCE,
        )

    widest = max(active // (3 * d_model * EXPERTS_PER_TOKEN), FINE_INNER_STEP)
    candidates = []
    for inner in range(FINE_INNER_STEP, widest + FINE_INNER_STEP, FINE_INNER_STEP):
        exact = total / (d_model * (3 * inner + 1))
        fewest = max(int(exact * (1 - TOTAL_TOLERANCE)), EXPERTS_PER_TOKEN)
        most = max(int(exact * (1 + TOTAL_TOLERANCE)), fewest)
        candidates += [
            MoEFFN(d_model, inner, experts, EXPERTS_PER_TOKEN)
            for experts in range(fewest, most + 1)
        ]
    return min(candidates, key=miss)


def pkm_config(config: UltraMemConfig) -> UltraMemConfig:
    """Product-key memory with the keys, the table and the slots a token of a Tucker configuration.

    What a rank's queries and keys are there, a head's are here: with R heads that keep M/R slots
    each, and values as wide as pre-value and value together, query projection, keys, rows and table
    have the same parameters, and what the two other projections have is in the value projection.
    Scores go through a softmax, as in arXiv 1907.05242.

    Raises:
        ValueError: ranks that share a query, or a topk that they do not divide.
    """
    rank = config.tucker_rank
    if config.num_queries != rank or config.topk % rank:
        raise ValueError(
            "config: must have a query for each rank and a topk that is a multiple of the rank, "
            f"got {config.num_queries} queries, topk = {config.topk}, rank {rank}"
        )
    topk = config.topk // rank
    return dataclasses.replace(
        config,
        mode="additive",
        score_norm="softmax",
        tucker_rank=1,
        num_cores=1,
        num_heads=config.num_heads * rank,
        topk=topk,
        axis_topk=min(topk, config.num_keys),
        pre_value_dim=0,
        value_dim=config.pre_value_dim + config.value_dim,
    )


def _pkm_case(config: UltraMemConfig) -> Case:
    pkm = PKMLayer(pkm_config(config))
    detail = (
        f"{pkm.config.num_heads} heads with {pkm.config.topk} slots each, plain values of "
        f"{pkm.config.value_dim}, of the memory layer's active and total parameters"
    )
    return Case("pkm", "PKM layer", "pkm", pkm, detail)
