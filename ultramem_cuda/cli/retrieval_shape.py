"""``ultramem doctor --shape``: what retrieval does with one shape."""

from __future__ import annotations

import dataclasses

import torch

from .. import _library, ops  # noqa: F401 (ops registers what is called on the meta device)
from ..examples.lm.errors import UsageError

_DTYPES = {
    **{"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32},
    **{"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32},
}
_MODES = ("tucker", "additive")
# Asked about where there is no GPU: what the library carries code for.
_CAPABILITIES = (90, 80)

LIMITS = (
    "Kd up to 1024 and a multiple of 8, m up to 128, M up to min(m*m, 1024), R and C 1 to 4, "
    "bf16 or fp16, query and keys at multiples of 16 bytes; sm_90: n up to 8192; sm_80 and later: "
    "n up to 65536, T * H from 64"
)
OUTSIDE = "the generic kernels run, as for fp32; but other m, M, R and C are refused"


@dataclasses.dataclass(frozen=True)
class RetrievalSizes:
    """Sizes of one product_key_topk call, by the names of docs/vocabulary.md."""

    num_keys: int
    key_dim: int
    axis_topk: int
    topk: int
    tucker_rank: int = 2
    num_cores: int = 2
    num_heads: int = 1
    num_queries: int = 2
    num_tokens: int = 8192
    dtype: torch.dtype = torch.bfloat16
    mode: str = "tucker"


STANDARD = {
    "S": RetrievalSizes(1138, 192, 32, 32),
    "B": RetrievalSizes(1448, 512, 32, 32),
    "M": RetrievalSizes(1056, 512, 128, 128),
    "L": RetrievalSizes(1928, 640, 128, 768),
}

_NUMBERS = {
    **{"n": "num_keys", "Kd": "key_dim", "m": "axis_topk", "M": "topk", "R": "tucker_rank"},
    **{"C": "num_cores", "H": "num_heads", "Q": "num_queries", "T": "num_tokens"},
}


def parse(text: str) -> RetrievalSizes:
    """Sizes from a standard shape's name, or from ``n=1138,Kd=192,M=32`` and more of the like.

    n, Kd and M must be there; m defaults to min(n, M, 128), R and C to 2 (additive mode: 1), Q to
    R, H to 1, T to 8192, dtype to bf16, mode to tucker.

    Raises:
        UsageError: for what is no size, and for sizes that product_key_topk refuses.
    """
    sizes = STANDARD[text] if text in STANDARD else _parse_pairs(text)
    try:
        _saved(sizes)
    except RuntimeError as error:
        # The first line is the operator's message; torch adds where it was raised.
        message = str(error).splitlines()[0].removeprefix("product_key_topk: ")
        raise UsageError("--shape", message) from None
    return sizes


def _parse_pairs(text: str) -> RetrievalSizes:
    numbers: dict[str, int] = {}
    dtype, mode = "bf16", "tucker"
    for pair in text.split(","):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or name not in (*_NUMBERS, "dtype", "mode"):
            known = ", ".join((*_NUMBERS, "dtype", "mode"))
            message = f"must be one of {', '.join(STANDARD)} or NAME=VALUE,... with names {known}"
            raise UsageError("--shape", f"{message}; got {text!r}")
        if name == "dtype":
            dtype = value
        elif name == "mode":
            mode = value
        elif value.isdecimal() and 0 < int(value) < 2**31:
            numbers[name] = int(value)
        else:
            raise UsageError("--shape", f"{name} must be a positive whole number, got {value!r}")
    if dtype not in _DTYPES:
        raise UsageError("--shape", f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    if mode not in _MODES:
        raise UsageError("--shape", f"mode must be one of {', '.join(_MODES)}, got {mode!r}")
    missing = [name for name in ("n", "Kd", "M") if name not in numbers]
    if missing:
        raise UsageError("--shape", f"{', '.join(missing)} missing in {text!r}")
    defaults = {"m": min(numbers["n"], numbers["M"], 128)}
    defaults |= {"R": 1, "C": 1} if mode == "additive" else {"R": 2, "C": 2}
    numbers = defaults | numbers
    numbers.setdefault("Q", numbers["R"])
    fields = {_NUMBERS[name]: number for name, number in numbers.items()}
    return RetrievalSizes(**fields, dtype=_DTYPES[dtype], mode=mode)


def facts(sizes: RetrievalSizes) -> list[tuple[str, str]]:
    """What doctor prints about it."""
    shape = _library.RetrievalShape(
        **{name: getattr(sizes, name) for name in _NUMBERS.values()},
        additive=sizes.mode == "additive",
        dtype=_library.RetrievalShape.DTYPES[sizes.dtype],
    )
    found = [("sizes", describe(sizes))]
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        capabilities: tuple[int, ...] = (10 * major + minor,)
    else:
        capabilities = _CAPABILITIES
    for capability in capabilities:
        path, reason = _library.retrieval_path(shape, capability)
        found.append((f"forward on sm_{capability}", f"{path}: {reason}"))
    found += [("tensor cores take", LIMITS), ("outside that", OUTSIDE)]
    saved = sum(tensor.numel() * tensor.element_size() for tensor in _saved(sizes))
    per_token = saved // sizes.num_tokens
    found.append(("saved for backward", f"{per_token} bytes a token, {_megabytes(saved)}"))
    workspace = _library.retrieval_workspace(shape)
    if workspace is None:
        found.append(("workspace", "depends on the GPU: none that torch and this build can use"))
    else:
        forward, backward = map(_megabytes, workspace)
        found.append(("workspace", f"forward {forward}, backward {backward}"))
    return found


def describe(sizes: RetrievalSizes) -> str:
    """All sizes on one line."""
    numbers = ", ".join(f"{symbol} {getattr(sizes, name)}" for symbol, name in _NUMBERS.items())
    dtype = str(sizes.dtype).removeprefix("torch.")
    return f"{numbers}, {dtype}, {sizes.mode}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _saved(sizes: RetrievalSizes) -> tuple[torch.Tensor, ...]:
    """What the operator keeps besides its inputs; runs its checks on tensors without memory."""
    heads, rank = sizes.num_heads, sizes.tucker_rank

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    query = empty(sizes.num_tokens, 2, heads, sizes.num_queries, sizes.key_dim, dtype=sizes.dtype)
    keys = empty(heads, 2, rank, sizes.num_keys, sizes.key_dim, dtype=sizes.dtype)
    core = u = t = None
    if sizes.mode == "tucker":
        core = empty(sizes.num_cores, heads, rank, rank)
        u, t = empty(heads, rank), empty(heads, rank)
    _, _, *saved = torch.ops.ultramem.product_key_topk(
        query, keys, core, u, t, sizes.topk, sizes.axis_topk, sizes.mode
    )
    return tuple(saved)
