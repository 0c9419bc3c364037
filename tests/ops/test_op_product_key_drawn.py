"""product_key_topk over thousands of drawn configurations, all shapes that it offers.

Sizes come from a seeded generator, so that every run has the same: log-uniform over n 1 .. 8192
(some have more) and Kd 8 .. 1024, with the ends and the neighbours of tile sizes drawn more often.
The kept sets are those of a float64 reference outside the error band, and the scores within their
bound; where ties are exact (whole numbers, copies of keys) the order is that of the contract, index
by index.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Any, NamedTuple

import pytest
import torch
from helpers import BAND_FEW, BAND_SHARE, BAND_USE, SCORE_BOUND, array
from retrieval_reference import (
    Reference,
    axis_scores,
    judge,
    reference,
    scores_at,
    separated,
)
from torch import Tensor

from ultramem_cuda import _library, ops
from ultramem_cuda import python_ref as ref

NUM_BATCHES, BATCH = 24, 100
KINDS = {
    "normal": 50,
    "integers": 14,
    "few keys": 10,
    "one key": 5,
    "ascending": 7,
    "descending": 4,
    "nan": 6,
    "inf": 4,
}
DTYPES = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)
EDGES = {
    "num_keys": (1, 2, 7, 8, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1056, 1138, 8191, 8192),
    "key_dim": (8, 16, 24, 56, 64, 72, 120, 128, 136, 192, 512, 640, 1016, 1024),
    "axis_topk": (1, 2, 8, 31, 32, 33, 63, 64, 65, 127, 128),
    "topk": (1, 2, 31, 32, 33, 128, 768, 1023, 1024),
    "tokens": (1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200),
}


class Limits(NamedTuple):
    """What a configuration may take, in elements."""

    num_keys: int
    keys: int  # H * 2 * R * n * Kd
    scores: int  # T * H * 2 * R * n
    grid: int  # T * H * m * m


GPU = Limits(8192, 70_000_000, 16_000_000, 8_000_000)
CPU = Limits(300, 400_000, 400_000, 100_000)


class Config(NamedTuple):
    kind: str
    dtype: torch.dtype
    tokens: int
    heads: int
    rank: int
    shared_query: bool
    cores: int  # 0: additive mode
    num_keys: int
    key_dim: int
    axis_topk: int
    topk: int
    seed: int

    @property
    def queries(self) -> int:
        return 1 if self.shared_query else self.rank

    @property
    def shape(self) -> _library.RetrievalShape:
        return _library.RetrievalShape(
            num_tokens=self.tokens,
            num_keys=self.num_keys,
            key_dim=self.key_dim,
            num_heads=self.heads,
            num_queries=self.queries,
            tucker_rank=self.rank,
            num_cores=max(self.cores, 1),
            axis_topk=self.axis_topk,
            topk=self.topk,
            additive=self.cores == 0,
            dtype=_library.RetrievalShape.DTYPES[self.dtype],
        )


def draw(seed: int, limits: Limits) -> Config:
    rng = random.Random(seed)

    def size(name: str, high: int, low: int = 1) -> int:
        edges = [value for value in EDGES[name] if low <= value <= high]
        if edges and rng.random() < 0.4:
            return rng.choice(edges)
        return min(high, round(math.exp(rng.uniform(math.log(low), math.log(high + 0.49)))))

    kind = rng.choices(list(KINDS), weights=list(KINDS.values()))[0]
    additive = rng.random() < 0.15
    num_keys = size("num_keys", limits.num_keys)
    key_dim = size("key_dim", 1024, 8)
    if rng.random() < 0.75:  # the tensor-core path's multiples of 8, one in four anything
        key_dim = -(-key_dim // 8) * 8
    heads, rank = rng.choice((1, 1, 2, 3)), 1 if additive else rng.choice((1, 2, 2, 3, 4))
    # An infinity in one of several ranks meets others of either sign: what comes out depends on
    # the order of the sum.
    if kind == "inf":
        rank = 1
    while heads * 2 * rank * num_keys * key_dim > limits.keys:
        if heads > 1:
            heads -= 1
        elif rank > 2:
            rank -= 1
        elif key_dim > 64:
            key_dim = max(64, key_dim // 16 * 8)
        else:
            num_keys //= 2
    axis_topk = size("axis_topk", min(num_keys, 128))
    tokens = size("tokens", 200)
    tokens = min(tokens, limits.scores // (heads * 2 * rank * num_keys))
    tokens = max(1, min(tokens, limits.grid // (heads * axis_topk**2)))
    largest = min(axis_topk**2, 1024)
    if additive and axis_topk < num_keys:
        largest = axis_topk
    return Config(
        kind,
        rng.choice(DTYPES),
        tokens,
        heads,
        rank,
        rng.random() < 0.3,
        0 if additive else rng.randint(1, 4),
        num_keys,
        key_dim,
        axis_topk,
        size("topk", largest),
        seed,
    )


class Inputs(NamedTuple):
    query: Tensor
    keys: Tensor
    core: Tensor | None
    u: Tensor | None
    t: Tensor | None
    # Key i is the base key classes[i] (see retrieval_reference.axis_scores).
    base_keys: Tensor
    classes: Tensor | None
    whole_numbers: bool

    def reference(self, config: Config) -> Reference:
        return reference(
            self.query,
            self.base_keys,
            self.core,
            self.u,
            self.t,
            topk=config.topk,
            axis_topk=config.axis_topk,
            classes=self.classes,
        )


def make_inputs(config: Config, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(config.seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device) * scale
        return values.to(config.dtype)

    def whole(high: int, *shape: int, dtype: torch.dtype = config.dtype) -> Tensor:
        values = torch.randint(-high, high + 1, shape, generator=generator, device=device)
        return values.to(dtype)

    heads, rank, key_dim = config.heads, config.rank, config.key_dim
    num_base = config.num_keys
    if config.kind in ("few keys", "one key"):
        num_base = 1 if config.kind == "one key" else min(config.num_keys, 5)
    query_shape = (config.tokens, 2, heads, config.queries, key_dim)
    base_shape = (heads, 2, rank, num_base, key_dim)
    whole_numbers = config.kind == "integers"
    if whole_numbers:
        query, base_keys = whole(1, *query_shape), whole(2, *base_shape)
    else:
        query, base_keys = normal(*query_shape), normal(*base_shape, scale=key_dim**-0.5)
    classes = None
    if num_base < config.num_keys:
        classes = torch.randint(num_base, (config.num_keys,), generator=generator, device=device)

    core = u = t = None
    if config.cores:
        core_shape = (config.cores, heads, rank, rank)
        if whole_numbers:
            core = whole(1, *core_shape, dtype=torch.float32)
            u = torch.arange(1.0, rank + 1, device=device).repeat(heads, 1)
            t = u.flip(-1).contiguous()
        else:
            core = torch.rand(core_shape, generator=generator, device=device)
            # Positive cores have positive singular vectors, up to their common sign.
            left, _, right = torch.linalg.svd(core.double().sum(0).cpu())
            u = left[..., :, 0].abs().float().to(device)
            t = right[..., 0, :].abs().float().to(device)
    _arrange(config, query, base_keys, generator)
    keys = base_keys if classes is None else base_keys[..., classes, :].contiguous()
    return Inputs(query, keys, core, u, t, base_keys, classes, whole_numbers)


def _arrange(config: Config, query: Tensor, keys: Tensor, generator: torch.Generator) -> None:
    """Sorted scores, or NaN and infinities in a few places, in place."""
    if config.kind in ("ascending", "descending"):
        # Two dimensions hold a whole number that bfloat16 alone could not. The sides have numbers
        # of their own: a grid of equal sides is symmetric, and full of ties that rounding breaks.
        keys.zero_()
        for side in range(2):
            numbers = torch.randperm(2**15 - 1, generator=generator, device=keys.device)
            line = (1 + numbers[: config.num_keys]).sort(descending=config.kind == "descending")[0]
            keys[:, side, ..., 0] = (line // 128 * 128 / 1024).to(keys.dtype)
            keys[:, side, ..., 1] = (line % 128 / 1024).to(keys.dtype)
        query[..., :2] = query[:, :1, :, :, :1].abs() + 0.5
    if config.kind not in ("nan", "inf"):
        return
    value = math.nan if config.kind == "nan" else math.inf

    def somewhere(size: int) -> int:
        place = torch.randint(size, (1,), generator=generator, device=keys.device)
        return int(place)

    # Sign and side as they come; a whole token of NaN, or keys that no token should keep.
    if config.kind == "nan" and somewhere(2) == 0:
        query[somewhere(config.tokens), somewhere(2), :, :, somewhere(config.key_dim)] = value
    for _ in range(1 + somewhere(3)):
        key = somewhere(config.num_keys)
        keys[:, somewhere(2), somewhere(config.rank), key, somewhere(config.key_dim)] = value


def run(config: Config, device: str) -> None:
    """One configuration: shapes, kept set, order of ties, scores."""
    inputs = make_inputs(config, device)
    scores, indices = ops.product_key_topk(
        inputs.query,
        inputs.keys,
        inputs.core,
        topk=config.topk,
        axis_topk=config.axis_topk,
        u=inputs.u,
        t=inputs.t,
        mode="tucker" if config.cores else "additive",
    )
    shape = (config.tokens, config.heads, config.topk)
    assert scores.shape == (*shape, max(1, config.cores)), config
    assert indices.shape == shape, config
    assert scores.dtype == torch.float32, config

    expected = inputs.reference(config)
    judgement = judge(expected, indices)
    assert not judgement.violations(), (config, judgement.violations())
    if inputs.classes is not None or inputs.whole_numbers:
        certain = separated(expected, _is_exact(inputs, expected))
        same = (indices == expected.indices).all(-1)
        assert bool((same | ~certain).all()), (config, "ties are out of order")
    band_used = int(judgement.band_used.sum())
    BAND_USE[device].add(indices.numel(), band_used)
    # Where both axes ascend evenly, pairs along an antidiagonal differ by less than float32 can
    # resolve.
    if config.kind not in ("ascending", "descending"):
        assert band_used <= max(BAND_FEW, BAND_SHARE * indices.numel()), (config, band_used)

    _check_nan_ties(config, expected, indices)
    _check_scores(config, inputs, expected, indices, scores)


def _is_exact(inputs: Inputs, expected: Reference) -> bool:
    """Whether float32 sums these inputs without rounding: whole numbers, none above 2^24."""
    if not inputs.whole_numbers:
        return False
    largest = expected.axis_scores.abs().amax(-1)  # [T, H, 2, R]
    row, col = largest[:, :, 0], largest[:, :, 1]
    if inputs.core is None:
        return True
    size = torch.einsum("thr,hrs,ths->th", row, inputs.core.double().abs().sum(0), col)
    return float(size.max()) < 2**24


def _check_nan_ties(config: Config, expected: Reference, indices: Tensor) -> None:
    """Slots whose rank is NaN come last and go by index."""
    if config.kind != "nan":
        return
    rows, cols = indices // config.num_keys, indices % config.num_keys
    all_nan = expected.grid_ranks.isnan().all(-1)
    ascending = (indices.diff(dim=-1) > 0).all(-1)
    assert bool((ascending | ~all_nan).all()), (config, "NaN slots are out of order")
    for side, ids in enumerate((rows, cols)):
        tied = expected.axis_ranks[:, :, side].isnan().all(-1)
        lowest = (ids < config.axis_topk).all(-1)
        assert bool((lowest | ~tied).all()), (config, "NaN keys are out of order")


def _check_scores(
    config: Config, inputs: Inputs, expected: Reference, indices: Tensor, scores: Tensor
) -> None:
    """Relative L2 error, relative to what the size would be with random signs where that is more
    (helpers.error_size); non-finite scores are non-finite in the same places."""
    right = scores_at(expected.axis_scores, inputs.core, indices)
    squares = axis_scores(
        inputs.query.double().square(), inputs.base_keys.double().square(), inputs.classes
    )
    core_squares = None if inputs.core is None else inputs.core.double().square()
    random_size = scores_at(squares, core_squares, indices)
    finite = right.isfinite()
    assert torch.equal(finite, scores.isfinite()), (config, "finite elsewhere")
    assert torch.equal(right.isnan(), scores.isnan()), (config, "NaN elsewhere")
    infinite = right.isinf()
    assert torch.equal(right[infinite], scores[infinite].double()), (config, "another infinity")
    error = (scores.double() - right).where(finite, 0.0).norm()
    size = torch.maximum(
        right.where(finite, 0.0).norm(), random_size.where(finite, 0.0).sum().sqrt()
    )
    assert bool(error <= SCORE_BOUND[config.dtype] * size), (config, float(error / size))


@pytest.mark.gpu
@pytest.mark.parametrize("batch", range(NUM_BATCHES))
def test_drawn_configurations(batch: int) -> None:
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        run(draw(seed, GPU), "cuda")


def draw_few_tokens(seed: int) -> Config:
    """In the dtypes and the multiples of 8 that the kernels for few tokens take, which choose their
    tiles by the number of tokens: up to 8, 16, 64, more."""
    rng = random.Random(~seed)
    config = draw(seed, GPU)
    heads, key_dim = config.heads, -(-config.key_dim // 8) * 8
    tokens = rng.choice((1, 2, 8, 9, 16, 17, 31, 32, 33, 63, 64, rng.randint(1, 64)))
    if rng.random() < 0.3:
        tokens = rng.choice((65, 127, 128, 129, 200, 256))
    if rng.random() < 0.2:
        heads, key_dim = 4, rng.choice((8, 24, 40, 72))
    while tokens > 1 and (
        tokens * heads * 2 * config.rank * config.num_keys > GPU.scores
        or tokens * heads * config.axis_topk**2 > GPU.grid
    ):
        tokens //= 2
    dtype = rng.choice((torch.bfloat16, torch.float16))
    return config._replace(tokens=tokens, heads=heads, key_dim=key_dim, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", range(8))
def test_drawn_configurations_of_few_tokens(batch: int) -> None:
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        run(draw_few_tokens(seed), "cuda")


def draw_long_keys(seed: int) -> Config:
    """For tiles of 64, 80 and 96 keys: whichever fills the multiprocessors in the fewest turns. Up
    to 64 tokens, on compute capability 9.0, for tiles of 48 by all tokens."""
    rng = random.Random(seed ^ 0x10C6)
    config = draw_few_tokens(seed)
    tokens = rng.choice((17, 33, 48, 64, 65, 127, 128, 129, 200, 256, 384, 512, 640, 1024))
    key_dim = rng.choice((264, 320, 448, 504, 512, 512, 576, 1024))
    num_keys = rng.randint(256, 3000)
    num_keys = min(num_keys, GPU.scores // (tokens * 2 * config.rank))
    axis_topk = min(config.axis_topk, num_keys, math.isqrt(GPU.grid // tokens))
    return config._replace(
        tokens=tokens,
        heads=1,
        num_keys=num_keys,
        key_dim=key_dim,
        axis_topk=axis_topk,
        topk=min(config.topk, axis_topk if config.cores == 0 else axis_topk**2),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("batch", range(3))
def test_drawn_configurations_of_long_keys(batch: int) -> None:
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        run(draw_long_keys(seed), "cuda")


# More than the kernel for few tokens takes; with so many heads, more blocks than run at once.
MANY_TOKENS = 1024
MANY_HEADS = 17
# Of one configuration, [token and head, kept rows x kept columns].
MANY_GRID = 32_000_000


def draw_many_tokens(seed: int) -> Config:
    """For every kernel for many tokens, in the dtypes and the multiples of 8 that they take."""
    rng = random.Random(seed ^ 0x5EED)
    config = draw(seed, GPU)
    heads, tokens = config.heads, rng.choice((1024, 1060, 1200, 2200)) // config.heads + 1
    if rng.random() < 0.5:
        heads, tokens = MANY_HEADS, rng.choice((193, 200, 256))
    key_dim = -(-config.key_dim // 8) * 8
    if rng.random() < 0.4:
        key_dim = rng.choice((8, 40, 64, 72, 128, 192))
    num_keys = min(config.num_keys, GPU.scores // (tokens * heads * 2 * config.rank))
    num_keys = min(num_keys, GPU.keys // (heads * 2 * config.rank * key_dim))
    axis_topk = min(config.axis_topk, num_keys, math.isqrt(MANY_GRID // (tokens * heads)))
    topk = min(config.topk, axis_topk**2)
    if config.cores == 0 and axis_topk < num_keys:
        topk = min(topk, axis_topk)
    return config._replace(
        tokens=tokens,
        heads=heads,
        num_keys=num_keys,
        key_dim=key_dim,
        axis_topk=axis_topk,
        topk=topk,
        dtype=rng.choice((torch.bfloat16, torch.float16)),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("batch", range(8))
def test_drawn_configurations_of_many_tokens(batch: int) -> None:
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        run(draw_many_tokens(seed), "cuda")


def draw_two_ranks(seed: int) -> Config:
    """For the kernel whose blocks have a rank each: some tiles of tokens, or more of them than the
    device takes at once, and keys of each of its lengths."""
    rng = random.Random(seed ^ 0x2A2A)
    config = draw(seed, GPU)
    heads, tokens = rng.choice(((1, 1025), (1, 1060), (2, 1200), (3, 2200), (MANY_HEADS, 256)))
    key_dim = rng.choice((200, 256, 264, 320, 448, 504, 512, 8 * rng.randint(25, 64)))
    num_keys = min(config.num_keys, GPU.scores // (tokens * heads * 4))
    num_keys = min(num_keys, GPU.keys // (heads * 4 * key_dim))
    axis_topk = min(config.axis_topk, num_keys, math.isqrt(MANY_GRID // (tokens * heads)))
    return config._replace(
        # An infinity needs a single rank (draw).
        kind="normal" if config.kind == "inf" else config.kind,
        tokens=tokens,
        heads=heads,
        rank=2,
        cores=max(config.cores, 1),
        num_keys=num_keys,
        key_dim=key_dim,
        axis_topk=axis_topk,
        topk=min(config.topk, axis_topk**2),
        dtype=rng.choice((torch.bfloat16, torch.float16)),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("batch", range(4))
def test_drawn_configurations_of_two_ranks(batch: int) -> None:
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        run(draw_two_ranks(seed), "cuda")


# More than the kernels of sm_90 take: on every GPU the tensor cores of sm_80.
MANY_KEYS = (8193, 8320, 9000, 12345, 16384, 40000, 65535, 65536)


def draw_many_keys(seed: int) -> Config:
    """Tokens for one block or some, in the dtypes and the multiples of 8 that it takes."""
    rng = random.Random(seed ^ 0xFACE)
    config = draw(seed, GPU)
    heads, rank = rng.choice((1, 1, 2)), config.rank
    # So many different numbers there are to put in order.
    ordered = config.kind in ("ascending", "descending")
    num_keys = rng.choice([keys for keys in MANY_KEYS if not ordered or keys < 2**15])
    key_dim = min(-(-config.key_dim // 8) * 8, GPU.keys // (heads * 2 * rank * num_keys) // 8 * 8)
    tokens = rng.choice((64, 65, 127, 128, 130, 200))
    tokens = max(64 // heads, min(tokens, GPU.scores // (heads * 2 * rank * num_keys)))
    topk = min(config.topk, config.axis_topk) if config.cores == 0 else config.topk
    return config._replace(
        tokens=tokens,
        heads=heads,
        num_keys=num_keys,
        key_dim=key_dim,
        topk=topk,
        dtype=rng.choice((torch.bfloat16, torch.float16)),
    )


@pytest.mark.parametrize("capability", [80, 89, 90, 120])
def test_many_keys_are_for_one_kernel(capability: int) -> None:
    for seed in range(BATCH):
        path, _ = _library.retrieval_path(draw_many_keys(seed).shape, capability)
        assert path == "tensor cores (sm_80)"


@pytest.mark.gpu
@pytest.mark.parametrize("batch", range(4))
def test_drawn_configurations_of_many_keys(batch: int) -> None:
    for seed in range(batch * BATCH // 2, (batch + 1) * BATCH // 2):
        run(draw_many_keys(seed), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("batch", range(2))
def test_a_token_is_the_same_in_any_company(batch: int) -> None:
    """Bit by bit, among up to 256 tokens, as long as the same kernels take them."""
    major, minor = torch.cuda.get_device_capability()
    seeds = range(batch * BATCH // 2, (batch + 1) * BATCH // 2)
    long_keys = (draw_long_keys(seed) for seed in seeds)
    # Those of more tokens become cases of the kernel for up to 64.
    long_keys = (c if c.tokens <= 256 else c._replace(tokens=64) for c in long_keys)
    for drawn in itertools.chain(map(draw_few_tokens, seeds), long_keys):
        config = drawn._replace(kind="normal")
        inputs = make_inputs(config, "cuda")

        def results(first: int, last: int) -> tuple[Tensor, Tensor]:
            return ops.product_key_topk(
                inputs.query[first:last].contiguous(),  # noqa: B023 (called in this round)
                inputs.keys,  # noqa: B023
                inputs.core,  # noqa: B023
                topk=config.topk,  # noqa: B023
                axis_topk=config.axis_topk,  # noqa: B023
                u=inputs.u,  # noqa: B023
                t=inputs.t,  # noqa: B023
                mode="tucker" if config.cores else "additive",  # noqa: B023
            )

        together = results(0, config.tokens)
        middle = config.tokens // 2
        for first, last in ((0, 1), (middle, middle + 1), (0, middle + 1)):
            paths = {
                _library.retrieval_path(config._replace(tokens=tokens).shape, 10 * major + minor)
                for tokens in (config.tokens, last - first)
            }
            if len(paths) > 1:
                continue
            for all_tokens, few in zip(together, results(first, last), strict=True):
                assert torch.equal(all_tokens[first:last], few), (config, first, last)


@pytest.mark.parametrize("batch", range(4))
def test_drawn_configurations_on_the_cpu(batch: int) -> None:
    for seed in range(batch * 40, (batch + 1) * 40):
        run(draw(seed, CPU), "cpu")


def test_what_is_drawn() -> None:
    """At least 2,000 configurations that reach every end of every range."""
    configs = [draw(seed, GPU) for seed in range(NUM_BATCHES * BATCH)]
    assert len(set(configs)) >= 2000
    assert {config.kind for config in configs} == set(KINDS)
    assert {config.dtype for config in configs} == set(DTYPES)
    assert {config.rank for config in configs} == {1, 2, 3, 4}
    assert {config.heads for config in configs} == {1, 2, 3}
    assert {config.cores for config in configs} == {0, 1, 2, 3, 4}
    assert {config.queries == config.rank for config in configs} == {True, False}
    for name, low, high in (
        ("num_keys", 1, 8192),
        ("key_dim", 8, 1024),
        ("axis_topk", 1, 128),
        ("topk", 1, 1024),
        ("tokens", 1, 200),
    ):
        values = [getattr(config, name) for config in configs]
        assert (min(values), max(values)) == (low, high), name
    for multiple in (True, False):
        assert sum((config.key_dim % 8 == 0) == multiple for config in configs) >= 200
    narrow = [c for c in configs if c.dtype != torch.float32 and c.key_dim % 8 == 0]
    assert len(narrow) >= 1000
    assert any(c.num_keys == 8192 and c.key_dim >= 512 for c in narrow)
    for config in configs:
        assert config.heads * 2 * config.rank * config.num_keys * config.key_dim <= GPU.keys
        assert config.axis_topk <= config.num_keys
        assert config.topk <= config.axis_topk**2


def test_what_is_drawn_of_few_tokens() -> None:
    configs = [draw_few_tokens(seed) for seed in range(8 * BATCH)]
    assert {config.kind for config in configs} == set(KINDS)
    assert {config.rank for config in configs} == {1, 2, 3, 4}
    assert {config.heads for config in configs} == {1, 2, 3, 4}
    assert {config.cores for config in configs} == {0, 1, 2, 3, 4}
    assert {config.queries == config.rank for config in configs} == {True, False}
    assert {8, 24, 40} <= {config.key_dim for config in configs}
    assert {1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129} <= {config.tokens for config in configs}
    assert any(config.tokens > 64 and config.key_dim > 256 for config in configs)
    assert max(config.axis_topk for config in configs) == 128
    assert max(config.num_keys for config in configs) == 8192
    for config in configs:
        assert 1 <= config.tokens <= 256
        assert config.key_dim % 8 == 0


def test_what_is_drawn_of_long_keys() -> None:
    configs = [draw_long_keys(seed) for seed in range(3 * BATCH)]
    assert {config.kind for config in configs} == set(KINDS)
    assert {config.rank for config in configs} == {1, 2, 3, 4}
    assert {config.cores for config in configs} == {0, 1, 2, 3, 4}
    many = [config for config in configs if config.tokens > 64]
    turns = {math.ceil(2 * c.rank * c.num_keys * c.tokens / (64 * 128 * 132)) for c in many}
    assert {1, 2, 3, 4} <= turns
    assert len(configs) - len(many) >= 60
    for config in configs:
        assert 17 <= config.tokens <= 1024
        assert config.key_dim > 256
        assert config.key_dim % 8 == 0
        assert 1 <= config.axis_topk <= config.num_keys
        assert 1 <= config.topk <= config.axis_topk**2


def test_what_is_drawn_of_many_tokens() -> None:
    configs = [draw_many_tokens(seed) for seed in range(8 * BATCH)]
    assert {config.kind for config in configs} == set(KINDS)
    assert {config.rank for config in configs} == {1, 2, 3, 4}
    assert {config.heads for config in configs} == {1, 2, 3, MANY_HEADS}
    assert {config.cores for config in configs} == {0, 1, 2, 3, 4}
    assert max(config.axis_topk for config in configs) >= 120
    assert max(config.num_keys for config in configs) >= 4000
    for config in configs:
        assert config.tokens * config.heads > MANY_TOKENS
        assert config.key_dim % 8 == 0
        assert 1 <= config.axis_topk <= config.num_keys
        assert 1 <= config.topk <= config.axis_topk**2
    # The keys of one side are not many tiles of any kernel, nor are they always one.
    for heads in (False, True):
        of_heads = [c for c in configs if (c.heads == MANY_HEADS) == heads]
        assert sum(c.rank == 2 and c.key_dim <= 192 and c.axis_topk <= 32 for c in of_heads) >= 20
        assert sum(c.axis_topk > 40 for c in of_heads) >= 20
        assert sum(c.num_keys > 256 for c in of_heads) >= 20
        assert sum(c.kind in ("one key", "few keys", "integers") for c in of_heads) >= 20


# ---- the machinery against python_ref ------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_the_reference_is_python_refs(seed: int) -> None:
    config = draw(seed, Limits(80, 20_000, 20_000, 20_000))
    inputs = make_inputs(config, "cpu")
    ours = inputs.reference(config)
    query, keys = array(inputs.query), array(inputs.keys)
    core, u, t = (None if x is None else array(x) for x in (inputs.core, inputs.u, inputs.t))
    theirs = ref.product_key_topk(
        query,
        keys,
        core,
        topk=config.topk,
        axis_topk=config.axis_topk,
        u=u,
        t=t,
        mode="tucker" if config.cores else "additive",
    )
    axis_band = ref.axis_band(query, keys, theirs.axis_filter)
    grid_band = ref.grid_band(query, keys, core)
    torch.testing.assert_close(ours.axis_band, torch.from_numpy(axis_band))
    torch.testing.assert_close(ours.grid_band, torch.from_numpy(grid_band))
    if config.kind not in ("few keys", "one key", "ascending", "descending"):
        # The others have ties that the order of a sum breaks.
        assert torch.equal(ours.indices, torch.from_numpy(theirs.indices))
    at = scores_at(ours.axis_scores, inputs.core, ours.indices)
    expected = ref.product_key_scores_at(
        query, keys, core, ours.indices.numpy(), "tucker" if config.cores else "additive"
    )
    torch.testing.assert_close(at, torch.from_numpy(expected), equal_nan=True)

    generator = torch.Generator().manual_seed(seed)
    for spoiled in _spoiled(ours.indices, config, generator):
        judgement = judge(ours, spoiled)
        verdict = ref.compare_kept_sets(
            theirs, spoiled.numpy(), axis_band=axis_band, grid_band=grid_band
        )
        assert int(judgement.wrong().sum()) == len(verdict.violations), (
            config,
            verdict.violations[:2],
        )


def _spoiled(indices: Tensor, config: Config, generator: torch.Generator) -> list[Tensor]:
    """The selection itself, and what is wrong with it in one way or another."""
    others = torch.randint(config.num_keys**2, indices.shape, generator=generator)
    one = indices.clone()
    one[..., -1] = others[..., -1]
    outside = indices.clone()
    outside[0, 0, 0] = config.num_keys**2
    return [indices, indices.flip(-1), one, others, indices[..., :1].expand_as(indices), outside]


def _one(kind: str) -> Config:
    seeds = (seed for seed in range(1000) if draw(seed, CPU).kind == kind)
    configs = (draw(seed, CPU) for seed in seeds)
    return next(c for c in configs if c.num_keys > 20 and c.topk > 10 and c.axis_topk < c.num_keys)


@pytest.mark.parametrize("kind", ["one key", "few keys", "integers"])
def test_ties_that_go_to_the_higher_index_are_noticed(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ops.product_key_topk

    def reversed_keys(query: Tensor, keys: Tensor, core: Tensor | None, **options: Any) -> Any:
        scores, indices = right(query, keys.flip(3), core, **options)
        return scores, keys.shape[3] ** 2 - 1 - indices

    config = _one(kind)
    run(config, "cpu")
    monkeypatch.setattr(ops, "product_key_topk", reversed_keys)
    with pytest.raises(AssertionError, match=r"out of order"):
        run(config, "cpu")


@pytest.mark.parametrize("kind", ["normal", "ascending"])
def test_keys_that_are_rounded_are_noticed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.product_key_topk
    monkeypatch.setattr(
        ops,
        "product_key_topk",
        lambda query, keys, core, **options: right(query, keys * 1.01, core, **options),
    )
    with pytest.raises(AssertionError):
        run(_one(kind), "cpu")
