"""product_key_topk in 16 bits where ranks tie, ascend or are not finite, for few and many tokens.

The CUDA forward chooses its kernels by the number of tokens and the sizes; all of them meet here
what can spoil a selection, in every token or in a few among random neighbours. Inputs are whole
numbers, which float32 sums exactly, or not finite: the kept slots, their order and their scores
are those of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from helpers import Data
from retrieval_reference import reference, scores_at
from torch import Tensor

from ultramem_cuda import _library, ops

DTYPES = [torch.bfloat16, torch.float16]


class Shape(NamedTuple):
    tokens: int
    heads: int
    rank: int
    num_queries: int
    num_keys: int
    key_dim: int
    axis_topk: int
    topk: int


# n is a multiple of no tile. Many tokens: T * H is above 1024.
SHAPES = {
    "few_rank_1": Shape(9, 2, 1, 1, 701, 72, 16, 40),
    "few_rank_2": Shape(60, 1, 2, 2, 650, 200, 48, 64),
    "several_rank_2": Shape(150, 2, 2, 2, 701, 320, 16, 40),
    "many_rank_1": Shape(1100, 1, 1, 1, 701, 136, 33, 64),
    "many_short_keys": Shape(521, 2, 2, 2, 701, 72, 16, 40),
    "many_rank_2": Shape(1060, 1, 2, 1, 650, 200, 48, 64),
    "many_long_keys": Shape(520, 2, 2, 2, 701, 328, 40, 40),
    "many_few_keys": Shape(1060, 1, 2, 2, 200, 328, 5, 9),
    # More tiles than 66 clusters take up at once, so that others' lists are picked from meanwhile.
    "many_more_than_at_once": Shape(4300, 1, 2, 2, 701, 264, 16, 16),
}
# Grids of all keys, and of all but two.
WHOLE_SHAPES = {
    "few_m_is_n": Shape(17, 1, 2, 2, 65, 40, 65, 200),
    "many_m_is_n": Shape(1040, 1, 2, 2, 65, 40, 65, 200),
    "few_m_is_128": Shape(40, 1, 1, 1, 130, 40, 128, 300),
    "many_m_is_128": Shape(520, 2, 2, 1, 130, 40, 128, 300),
}
# A tile of them and a bit.
CPU_TOKENS = 26

# The first elements of every key, by what a query that picks these alone has for scores. Two
# elements hold a whole number that bfloat16 alone could not.
LINES = {
    "ascending": (0, 1),
    "descending": (2, 3),
    "two values": (4,),
    "eight values": (5,),
    "all equal": (6,),
    "signed zeros": (7,),
    "ascending, every third tile low": (8, 9),
    "ascending, every second tile low": (10, 11),
    "ascending, the sample high": (12, 13),
    "ascending, the sample low": (14, 15),
}
NUM_ORDERED = 16


def ascending_but(low: Tensor) -> Tensor:
    """The place of each key in an ascending order in which those keys come before all others."""
    return torch.argsort(torch.argsort((~low).long(), stable=True))


def in_sample(ids: Tensor, num_keys: int) -> Tensor:
    """Whether the kernel with a rank a block looks at a key first, to guess a bound.

    At n 650 with m 48 and n 701 with m 40 it takes two tiles of 128, one of either half of the ids:
    there every stride-th key from two first ones on (csrc/cuda/product_key_sample.h). Where these
    are the best of all, fewer than m keys are above what it guesses.
    """
    part = num_keys // 2
    stride = max(part // 64, 1)
    places = ids % part - max(part - 64 * stride, 0) // 2
    inside = (ids < 2 * part) & (places >= 0) & (places < 64 * stride)
    return inside & torch.isin(places % stride, torch.tensor([0, stride // 2]))


class Inputs:
    """Lines in the first elements of the keys, small random numbers in the others; no queries."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        if device == "cpu":
            shape = shape._replace(tokens=min(shape.tokens, CPU_TOKENS))
        self.shape, self.data = shape, Data(shape.num_keys, device)
        heads, rank, num_keys = shape.heads, shape.rank, shape.num_keys
        self.keys = self._random(heads, 2, rank, num_keys, shape.key_dim).to(dtype)
        ids = torch.arange(num_keys)
        # In tiles of 128. A kernel that looks at some of the tiles first sees some of the low ones,
        # or all and nothing else.
        lines = {
            "ascending": ids,
            "descending": ids.flip(0),
            "ascending, every third tile low": ascending_but(ids // 128 % 3 == 1),
            "ascending, every second tile low": ascending_but(ids // 128 % 2 == 0),
            "ascending, the sample high": ascending_but(~in_sample(ids, num_keys)),
            "ascending, the sample low": ascending_but(in_sample(ids, num_keys)),
        }
        for name, line in lines.items():
            self.keys[..., LINES[name][0]] = (line // 32 * 32).to(self.keys)
            self.keys[..., LINES[name][1]] = (line % 32).to(self.keys)
        values = self.data.integers(8, heads, 2, rank, num_keys)
        self.keys[..., LINES["two values"][0]] = (values % 2 * 2 - 1).to(dtype)
        self.keys[..., LINES["eight values"][0]] = (values + 1).to(dtype)
        self.keys[..., LINES["all equal"][0]] = 3.0
        zeros = torch.tensor([-0.0, 0.0])[ids % 2]
        self.keys[..., LINES["signed zeros"][0]] = zeros.to(self.keys)
        query_shape = (shape.tokens, 2, heads, shape.num_queries, shape.key_dim)
        self.query = torch.zeros(query_shape, dtype=dtype, device=device)
        # Positive, so that the sign of an infinity is that of the score, in whatever order of sums.
        self.core = 1.0 + self.data.integers(2, 2, heads, rank, rank, dtype=torch.float32)
        self.u = torch.arange(1.0, rank + 1, device=device).repeat(heads, 1)
        self.t = self.u.flip(-1).contiguous()

    def _random(self, *shape: int) -> Tensor:
        return self.data.integers(5, *shape) - 2

    def pick(self, kind: str, tokens: int | slice = slice(None), side: int | None = None) -> None:
        """Queries that see one line of the keys, on one side or both."""
        sides = slice(None) if side is None else side
        self.query[tokens, sides] = 0.0
        for element in LINES[kind]:
            self.query[tokens, sides, ..., element] = 1.0

    def randomise(self, tokens: slice = slice(None)) -> None:
        """Queries that see all of the keys but the lines."""
        elements = self.query[tokens, ..., NUM_ORDERED:]
        self.query[tokens] = 0.0
        self.query[tokens, ..., NUM_ORDERED:] = self._random(*elements.shape).to(self.query)

    def check(self) -> None:
        """Indices and scores equal the reference's."""
        sizes = {"topk": self.shape.topk, "axis_topk": self.shape.axis_topk}
        scores, indices = ops.product_key_topk(
            self.query, self.keys, self.core, u=self.u, t=self.t, **sizes
        )
        expected = reference(self.query, self.keys, self.core, self.u, self.t, **sizes)
        finite = expected.axis_scores.where(expected.axis_scores.isfinite(), 0.0)
        row, col = finite.abs().amax(-1).unbind(2)
        size = torch.einsum("thr,hrs,ths->th", row, self.core.double().sum(0), col)
        assert float(size.amax()) < 2**24, "float32 rounds some of these sums"
        wrong = (indices != expected.indices).any(-1).nonzero().tolist()
        assert not wrong, f"other slots or another order at {len(wrong)} of [T, H]: {wrong[:8]}"
        right = scores_at(expected.axis_scores, self.core, indices).float()
        torch.testing.assert_close(scores, right, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("num_keys", [650, 701])
def test_the_sample_is_two_tiles(num_keys: int) -> None:
    assert int(in_sample(torch.arange(num_keys), num_keys).sum()) == 2 * 128


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> Shape:
    return SHAPES[request.param]


@pytest.fixture(params=DTYPES, ids=["bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def inputs(shape: Shape, device: str, dtype: torch.dtype) -> Inputs:
    return Inputs(shape, device, dtype)


@pytest.mark.parametrize("name", [*SHAPES, *WHOLE_SHAPES])
def test_the_shapes_reach_all_kernels(name: str, dtype: torch.dtype) -> None:
    shape = (SHAPES | WHOLE_SHAPES)[name]
    fields = _library.RetrievalShape(
        num_tokens=shape.tokens,
        num_keys=shape.num_keys,
        key_dim=shape.key_dim,
        num_heads=shape.heads,
        num_queries=shape.num_queries,
        tucker_rank=shape.rank,
        num_cores=2,
        axis_topk=shape.axis_topk,
        topk=shape.topk,
        dtype=_library.RetrievalShape.DTYPES[dtype],
    )
    many = name.startswith("many")
    assert (shape.tokens * shape.heads > 1024) == many
    path, _ = _library.retrieval_path(fields, 80)
    assert path == ("tensor cores (sm_80)" if many else "tensor cores, few tokens")
    path, _ = _library.retrieval_path(fields, 90)
    fields.num_tokens = 8192
    if _library.retrieval_path(fields, 90)[0] == "tensor cores (sm_80)":
        pytest.skip("built without code for sm_90a")
    assert path == ("tensor cores (sm_90)" if many else "tensor cores, few tokens")


@pytest.mark.parametrize("kind", LINES)
def test_every_token(inputs: Inputs, kind: str) -> None:
    inputs.pick(kind)
    inputs.check()


def some_tokens(tokens: int) -> Iterator[int]:
    """Alone, beside each other, and at the ends of tiles, a few in a hundred."""
    places = (0, 3, 7, 8, 31, 32, 63, 64, 65, 127, 128, 200, 255, 256, 257, 383, 511, 512)
    yield from sorted({place for place in places if place < tokens} | {tokens - 1})


@pytest.mark.parametrize("side", [0, 1])
def test_some_tokens_among_others(inputs: Inputs, side: int) -> None:
    inputs.randomise()
    for number, token in enumerate(some_tokens(inputs.shape.tokens)):
        inputs.pick(list(LINES)[number % len(LINES)], token, side)
    inputs.check()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
def test_queries_that_are_not_finite(inputs: Inputs, value: float) -> None:
    """Whole queries, of one side or both, or one element of them; others are random."""
    inputs.randomise()
    # A query that the ranks share is as infinite in all of them.
    inputs.keys[..., -1] = inputs.keys[:, :, :1, :, -1].clone()
    for number, token in enumerate(some_tokens(inputs.shape.tokens)):
        # Beside infinite scores the other side's are positive.
        inputs.pick("eight values", token)
        side = number % 2
        if number % 3 == 0:
            inputs.query[token, side, ..., -1] = value
        elif number % 3 == 1:
            inputs.query[token, side] = value
        else:
            inputs.query[token] = value
    inputs.check()


def spread(num_keys: int, count: int) -> Tensor:
    """Ids of that many keys, in all parts of the range."""
    return torch.arange(count) * (num_keys - 1) // max(1, count - 1)


@pytest.mark.parametrize("numbers", ["all but one", "half", "fewer than m", "none"])
def test_keys_that_are_nan(inputs: Inputs, numbers: str) -> None:
    """Of one side or of both, in any element of any rank."""
    n, m = inputs.shape.num_keys, inputs.shape.axis_topk
    count = {"all but one": 1, "half": n // 2, "fewer than m": n - m + 3, "none": n}[numbers]
    inputs.randomise()
    for number, token in enumerate(some_tokens(inputs.shape.tokens)):
        inputs.pick(list(LINES)[number % len(LINES)], token)
    ids = spread(n, count) if count > 1 else torch.tensor([n - 2])
    inputs.keys[:, 0, -1, ids, -1] = math.nan
    inputs.check()
    inputs.keys[:, 1, 0, ids.flip(0), NUM_ORDERED + 1] = math.nan
    inputs.check()


def test_a_wrong_guess_among_keys_that_are_nan(inputs: Inputs) -> None:
    """NaN must not count for the numbers that a guessed bound has left out."""
    num_keys, m = inputs.shape.num_keys, inputs.shape.axis_topk
    others = (~in_sample(torch.arange(num_keys), num_keys)).nonzero().flatten()
    inputs.keys[..., others[spread(len(others), m)], :] = math.nan
    inputs.pick("ascending, the sample high")
    inputs.check()


@pytest.mark.parametrize("signs", [(1,), (-1,), (1, -1)], ids=["inf", "-inf", "both"])
@pytest.mark.parametrize("count", [3, 300])
def test_keys_that_are_infinite(inputs: Inputs, count: int, signs: tuple[int, ...]) -> None:
    inputs.randomise()
    inputs.pick("eight values", side=1)
    inputs.query[:, 0, ..., NUM_ORDERED] = 1.0
    for place, ids in enumerate(spread(inputs.shape.num_keys, count).tensor_split(2)):
        inputs.keys[:, 0, 0, ids, NUM_ORDERED] = signs[place % len(signs)] * math.inf
    inputs.check()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
def test_filters(inputs: Inputs, value: float) -> None:
    """u and t with one such weight, and of such weights alone."""
    inputs.randomise()
    inputs.pick("two values", slice(1, None, 4))
    if math.isinf(value):
        # Backends may weigh the scores or, before, what they are sums of: no sum of infinities of
        # both signs, and none times zero.
        sign = inputs.keys[:, :, :1, :, NUM_ORDERED:].sum(-1, keepdim=True) * 2 + 1
        inputs.keys.abs_().clamp_(1.0, 4.0).mul_(sign.sign())
        inputs.query.abs_().clamp_(1.0, 2.0)
    for weights in (inputs.u, inputs.t):
        finite = weights.clone()
        for changed in (slice(0, 1), slice(None)):
            weights[:, changed] = value
            inputs.check()
        weights.copy_(finite)


def test_negative_zero_equals_zero(inputs: Inputs) -> None:
    """On the axis -0 - 0 beside -1 + 1, in the grid 0 times either sign."""
    inputs.pick("signed zeros", side=0)
    inputs.pick("two values", side=1)
    element = LINES["signed zeros"][0]
    inputs.keys[:, 0, 0, ::2, element] = -1.0 if inputs.shape.rank > 1 else -0.0
    inputs.keys[:, 0, -1, ::2, element] = 1.0 if inputs.shape.rank > 1 else -0.0
    inputs.u.fill_(-1.0)
    inputs.check()
    inputs.u.fill_(0.0)
    inputs.check()


def test_duplicated_keys(inputs: Inputs) -> None:
    """The best key of all tokens, several times."""
    inputs.randomise()
    n, element = inputs.shape.num_keys, LINES["all equal"][0]
    copies = torch.tensor([2, 3, 63, 64, 65, n // 2, n - 1])
    inputs.keys[..., copies, :] = inputs.keys[..., 2:3, :].clone()
    inputs.keys[..., copies, element] = 96.0
    inputs.query[..., element] = 1.0
    inputs.check()


@pytest.mark.parametrize("name", WHOLE_SHAPES)
def test_grids_of_almost_all_keys(device: str, dtype: torch.dtype, name: str) -> None:
    inputs = Inputs(WHOLE_SHAPES[name], device, dtype)
    inputs.randomise()
    for number, kind in enumerate(LINES):
        inputs.pick(kind, slice(1 + number, None, len(LINES) + 2))
    inputs.check()
    inputs.keys[:, :, -1, ::2, NUM_ORDERED] = math.nan
    inputs.check()
