"""product_key_topk in float64 torch, and a selection held against it, all tokens at once.

What `python_ref` and its compare_kept_sets say token by token, for thousands of configurations on a
GPU: only torch's own float64 arithmetic is used, and test_op_product_key_drawn.py holds this file
against python_ref.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT32_UNIT = float(torch.finfo(torch.float32).eps)


@dataclass(frozen=True)
class Reference:
    """Everything in float64; sides are 0 = row, 1 = column."""

    axis_scores: Tensor  # [T, H, 2, R, n]
    axis_ranks: Tensor  # [T, H, 2, n]
    axis_kept: Tensor  # [T, H, 2, m] keys, ascending
    core_sum: Tensor | None  # [H, R, R]; None in additive mode
    indices: Tensor  # [T, H, M], in the order of the contract
    grid_ranks: Tensor  # [T, H, m * m], candidates in ascending order of index
    axis_band: Tensor  # [T, H, 2]
    grid_band: Tensor  # [T, H]

    @property
    def num_keys(self) -> int:
        return self.axis_ranks.shape[-1]


@dataclass(frozen=True)
class Judgement:
    """What is wrong with a selection, by token and head [T, H], and how often the band was used."""

    out_of_range: Tensor
    repeated: Tensor
    unordered: Tensor
    below_axis_threshold: Tensor
    too_many_keys: Tensor
    missing: Tensor
    band_used: Tensor

    def faults(self) -> dict[str, Tensor]:
        """Everything but the use of the band, by name."""
        names = (
            *("out_of_range", "repeated", "unordered", "below_axis_threshold"),
            *("too_many_keys", "missing"),
        )
        return {name: getattr(self, name) for name in names}

    def wrong(self) -> Tensor:
        """[T, H]."""
        return torch.stack(list(self.faults().values())).any(0)

    def violations(self) -> dict[str, int]:
        """Number of (token, head) pairs by what is wrong with them."""
        faults = self.faults()
        counts = torch.stack([fault.sum() for fault in faults.values()]).tolist()
        return {name: count for name, count in zip(faults, counts, strict=True) if count}


def axis_scores(query: Tensor, keys: Tensor, classes: Tensor | None = None) -> Tensor:
    """[T, H, 2, R, n]. classes [n]: keys holds one key per class, key i is that of classes[i].

    A matrix product may sum columns in different orders; through classes equal keys get equal
    scores to the last bit.
    """
    tokens, _, heads, _, key_dim = query.shape
    rank = keys.shape[2]
    expanded = query.expand(tokens, 2, heads, rank, key_dim)
    scores = torch.einsum("tshrk,hsrnk->thsrn", expanded, keys)
    return scores if classes is None else scores[..., classes]


def reference(
    query: Tensor,
    keys: Tensor,
    core: Tensor | None,
    u: Tensor | None,
    t: Tensor | None,
    *,
    topk: int,
    axis_topk: int,
    classes: Tensor | None = None,
) -> Reference:
    """Scores, selection and error bands; additive mode where core, u and t are None."""
    query, keys = query.double(), keys.double()
    rank, key_dim, heads = keys.shape[2], keys.shape[4], keys.shape[0]
    if core is None or u is None or t is None:
        axis_filter = torch.ones(heads, 2, 1, dtype=torch.float64, device=keys.device)
        core_sum = None
    else:
        axis_filter = torch.stack((u.double(), t.double()), dim=1)
        core_sum = core.double().sum(0)
    scores = axis_scores(query, keys, classes)
    ranks = (axis_filter[..., None] * scores).sum(3)
    kept = _descending(ranks)[..., :axis_topk].sort(-1).values

    grid_ranks, grid_indices = _grid(scores, core_sum, kept)
    best = _descending(grid_ranks)[..., :topk]
    indices = grid_indices.gather(-1, best)

    magnitudes = axis_scores(query.abs(), keys.abs(), classes)
    largest_rank = _largest_finite((axis_filter.abs()[..., None] * magnitudes).sum(3))
    largest = _largest_finite(magnitudes)  # [T, H, 2, R]
    row, col = largest[:, :, 0], largest[:, :, 1]
    if core is None:
        grid_band = 2 * _gamma(key_dim + 1) * (row + col)[..., 0]
    else:
        size = torch.einsum("thr,hrs,ths->th", row, core.double().abs().sum(0), col)
        grid_band = 2 * _gamma(2 * key_dim + core.shape[0] + 2 * rank + 3) * size
    axis_band = 2 * _gamma(key_dim + rank + 1) * largest_rank
    return Reference(scores, ranks, kept, core_sum, indices, grid_ranks, axis_band, grid_band)


def scores_at(scores: Tensor, core: Tensor | None, indices: Tensor) -> Tensor:
    """[T, H, M, C] from axis scores [T, H, 2, R, n] at slots [T, H, M]."""
    row, col = _pair(scores, indices // scores.shape[-1], indices % scores.shape[-1])
    if core is None:
        return (row + col).transpose(-1, -2)
    return torch.einsum("thrk,chrs,thsk->thkc", row, core.double(), col)


def judge(reference: Reference, indices: Tensor) -> Judgement:
    """The rules of python_ref's compare_kept_sets, for every token and head at once."""
    num_keys, axis_topk = reference.num_keys, reference.axis_kept.shape[-1]
    in_range = (indices >= 0) & (indices < num_keys**2)
    indices = indices.where(in_range, 0)
    ordered = indices.sort(-1).values
    repeated = (ordered.diff(dim=-1) == 0).any(-1)

    sides = torch.stack((indices // num_keys, indices % num_keys), dim=2)  # [T, H, 2, M]
    ranks = _nan_lowest(_rank_at(reference, sides[:, :, 0], sides[:, :, 1]))
    running_min = ranks.cummin(-1).values
    unordered = (ranks - reference.grid_band[..., None] > running_min).any(-1)

    axis_ranks = _nan_lowest(reference.axis_ranks)
    band = reference.axis_band[..., None]
    threshold = axis_ranks.topk(axis_topk, dim=-1).values[..., -1:]  # [T, H, 2, 1]
    below = ~(axis_ranks.gather(-1, sides) >= threshold - band)
    certain = axis_ranks > threshold + band
    if axis_topk == num_keys:
        certain = axis_ranks >= threshold
    must = certain.scatter(-1, sides, True)
    too_many = (must.sum(-1) > axis_topk).any(-1)

    # The keys that are kept or must be, at most m a side where that is not wrong already.
    chosen = must.to(torch.uint8).topk(axis_topk, dim=-1)
    valid = chosen.values.bool()
    keys = chosen.indices
    rivals = _nan_lowest(
        _rank_at(
            reference,
            keys[:, :, 0, :, None].expand(-1, -1, -1, axis_topk).flatten(2),
            keys[:, :, 1, None, :].expand(-1, -1, axis_topk, -1).flatten(2),
        )
    )
    rival_indices = (keys[:, :, 0, :, None] * num_keys + keys[:, :, 1, None, :]).flatten(2)
    pairs = (valid[:, :, 0, :, None] & valid[:, :, 1, None, :]).flatten(2)
    rivals = rivals.masked_fill(~pairs | _contains(ordered, rival_indices), -torch.inf)
    excess = rivals.amax(-1) - ranks.amin(-1)
    missing = excess > reference.grid_band

    band_used = ~_contains(reference.indices.sort(-1).values, indices)
    return Judgement(
        ~in_range.all(-1),
        repeated,
        unordered,
        below.any(-1).any(-1),
        too_many,
        missing,
        band_used.sum(-1),
    )


def separated(reference: Reference, exact: bool) -> Tensor:
    """Where no two ranks that differ lie within the band, so that the order is certain: [T, H].

    exact: the arithmetic of these inputs is, so that all ranks are certain.
    """
    if exact:
        return torch.ones_like(reference.grid_band, dtype=torch.bool)
    axis = _smallest_gap(reference.axis_ranks) > reference.axis_band
    return axis.all(-1) & (_smallest_gap(reference.grid_ranks) > reference.grid_band)


def _smallest_gap(ranks: Tensor) -> Tensor:
    """Of ranks that are not equal, along the last dimension."""
    gaps = ranks.sort(-1).values.diff(dim=-1)
    gaps = torch.nn.functional.pad(gaps, (0, 1), value=torch.inf)
    return gaps.masked_fill(gaps == 0, torch.inf).amin(-1)


def _grid(scores: Tensor, core_sum: Tensor | None, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks and indices [T, H, m * m] of the candidates, ascending by index for ascending keys."""
    size = kept.shape[-1]
    rows = kept[:, :, 0, :, None].expand(-1, -1, -1, size).flatten(2)
    cols = kept[:, :, 1, None, :].expand(-1, -1, size, -1).flatten(2)
    return _grid_rank(*_pair(scores, rows, cols), core_sum), rows * scores.shape[-1] + cols


def _rank_at(reference: Reference, rows: Tensor, cols: Tensor) -> Tensor:
    return _grid_rank(*_pair(reference.axis_scores, rows, cols), reference.core_sum)


def _pair(scores: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column scores [T, H, R, K] of the keys rows, cols [T, H, K]."""
    rank = scores.shape[3]
    row, col = (ids[:, :, None].expand(-1, -1, rank, -1) for ids in (rows, cols))
    return scores[:, :, 0].gather(-1, row), scores[:, :, 1].gather(-1, col)


def _grid_rank(row: Tensor, col: Tensor, core_sum: Tensor | None) -> Tensor:
    """Element by element over the few ranks, so that equal operands give equal ranks."""
    if core_sum is None:
        return (row + col)[:, :, 0]
    total = torch.zeros_like(row[:, :, 0])
    rank = row.shape[2]
    for s in range(rank):
        folded = sum(row[:, :, r] * core_sum[None, :, r, s, None] for r in range(rank))
        total += folded * col[:, :, s]
    return total


def _descending(ranks: Tensor) -> Tensor:
    """Positions by rank, best first: ties to the lower position, NaN after -inf."""
    # A radix sort would put -0 below +0; their sum is +0.
    order = (_nan_lowest(ranks) + 0.0).sort(dim=-1, descending=True, stable=True).indices
    is_nan = ranks.isnan().gather(-1, order).to(torch.uint8)
    return order.gather(-1, is_nan.sort(dim=-1, stable=True).indices)


def _contains(ascending: Tensor, wanted: Tensor) -> Tensor:
    """Whether each of wanted [.., K] is among ascending [.., M], which is sorted."""
    place = torch.searchsorted(ascending, wanted.contiguous()).clamp_(max=ascending.shape[-1] - 1)
    return ascending.gather(-1, place) == wanted


def _nan_lowest(ranks: Tensor) -> Tensor:
    return ranks.masked_fill(ranks.isnan(), -torch.inf)


def _largest_finite(magnitudes: Tensor) -> Tensor:
    return magnitudes.masked_fill(~magnitudes.isfinite(), 0.0).amax(-1)


def _gamma(num_terms: int) -> float:
    return num_terms * FLOAT32_UNIT / (1.0 - num_terms * FLOAT32_UNIT)
