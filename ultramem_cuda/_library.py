"""Finds and loads the native torch library, and says what it holds."""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ._version import NATIVE_API_VERSION

OLDEST_TORCH = (2, 11)

# ULTRAMEM_LIBRARY names another build of the library, such as one with sanitizers.
_PATH = Path(
    os.environ.get("ULTRAMEM_LIBRARY") or Path(__file__).resolve().parent / "libultramem_torch.so"
)


def _load() -> str | None:
    if not _PATH.is_file():
        if (_PATH.parent.parent / "setup.py").is_file():
            return (
                f"this is the source tree at {_PATH.parent.parent}, whose native library is not "
                "built, and it hides an installed ultramem_cuda: run Python from another folder, "
                "or build it here with `pip install --no-build-isolation -e .`"
            )
        return f"the native library {_PATH} is missing; `pip install` ultramem_cuda again"
    try:
        torch.ops.load_library(_PATH)
    except OSError as error:
        # torch's own error hides what the loader says.
        said = str(error.__cause__ or error)
        return (
            f"the native library {_PATH} does not load under torch {torch.__version__}: {said}"
            + _hint(said, torch.__version__)
        )
    if not hasattr(torch.ops.ultramem, "value_ffn"):
        return f"{_PATH} is a library, but holds none of the operators"
    version = _api_version(ctypes.CDLL(str(_PATH)))
    if version != NATIVE_API_VERSION:
        return (
            f"the native library {_PATH} and the Python files beside it are of different versions "
            f"(API version {'unknown' if version is None else version}; these files need "
            f"{NATIVE_API_VERSION}): build it again (`make build` in a checkout), or "
            "`pip install --force-reinstall` ultramem_cuda"
        )
    return None


def _hint(loader_says: str, torch_version: str) -> str:
    """What to do about a message of the dynamic loader, as far as it is known."""
    release = tuple(map(int, re.findall(r"\d+", torch_version)[:2]))
    if release < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return f'; it needs torch {oldest} or later: pip install "torch>={oldest}"'
    missing = re.search(r"version `((GLIBC|GLIBCXX|CXXABI)_[\d.]+)' not found", loader_says)
    if missing is None:
        return ""
    library = "C library (glibc)" if missing[2] == "GLIBC" else "C++ library (libstdc++)"
    return (
        f"; this system's {library} is older than the one it was built for ({missing[1]}): build "
        "ultramem_cuda from source here, or use a newer system"
    )


def _api_version(library: ctypes.CDLL) -> int | None:
    """ultramem::kApiVersion of a library, None before it was exported."""
    try:
        return int(library.ultramem_api_version())
    except AttributeError:
        return None


_load_error = _load()
_has_cuda_kernels = _load_error is None and torch._C._dispatch_has_kernel_for_dispatch_key(
    "ultramem::value_ffn", "CUDA"
)


def is_loaded() -> bool:
    """Whether the operators are there. Importing the package never fails for want of them."""
    return _load_error is None


def load_error() -> str | None:
    """Why the library is not loaded, or None."""
    return _load_error


def require(device_type: str = "cpu") -> None:
    """Raises RuntimeError, with the reason, unless operators can run on this type of device."""
    if _load_error is not None:
        raise RuntimeError(f"ultramem_cuda: {_load_error}")
    if device_type == "cuda" and not _has_cuda_kernels:
        raise RuntimeError(
            "ultramem_cuda: this build is CPU-only, so CUDA tensors are refused; "
            "build it again where nvcc is found (`ultramem doctor` says what was found)"
        )


def library_path() -> Path:
    """Where the native torch library is, or would be."""
    return _PATH


def has_cuda_kernels() -> bool:
    """Whether this build carries CUDA kernels (says nothing about the machine)."""
    return _has_cuda_kernels


def cpu_capability() -> str:
    """Instruction set the CPU operators run on here: "AVX512", "AVX2" or "DEFAULT".

    ULTRAMEM_CPU_CAPABILITY (avx512, avx2, default) in the environment lowers it.
    """
    require()
    function = _c_functions().ultramem_cpu_capability
    function.restype = ctypes.c_char_p
    return str(function().decode())


def build_info() -> dict[str, Any]:
    """What the library was built with and for.

    Returns:
        version, build_type, cxx_compiler, cuda_compiler (None in a CPU-only build),
        cuda_architectures and cpu_capabilities (lists; CMake's notation), api_version.
    """
    require()
    function = _c_functions().ultramem_build_info
    function.restype = ctypes.c_char_p
    info: dict[str, Any] = json.loads(function())
    for name in ("cuda_architectures", "cpu_capabilities"):
        info[name] = [item for item in info[name].split(",") if item]
    info["cuda_compiler"] = info["cuda_compiler"] or None
    return info


def missing_module() -> str | None:
    """Why the module _C, which belongs to one Python version, cannot be imported; or None."""
    try:
        importlib.import_module("ultramem_cuda._C")
    except ImportError as error:
        return str(error)
    return None


def kernel_attributes() -> list[dict[str, Any]]:
    """Registers, shared and local memory and occupancy of each CUDA kernel on the current device.

    Raises:
        RuntimeError: without a GPU, without CUDA kernels, or without the module _C.
    """
    require()
    missing = missing_module()
    if missing is not None:
        raise RuntimeError(f"ultramem_cuda: no module _C for this Python ({missing})")
    extension = importlib.import_module("ultramem_cuda._C")
    attributes: list[dict[str, Any]] = extension.kernel_attributes(str(_PATH))
    return attributes


@functools.cache
def _c_functions() -> ctypes.CDLL:
    return ctypes.CDLL(str(_PATH))


# ultramem::DType
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def factors_sections(
    sizes: Sequence[int], dtypes: tuple[torch.dtype, torch.dtype]
) -> tuple[int, ...]:
    """Where the sections of an arena of factors begin, in bytes a token, and where the last ends.

    Args:
        sizes: S, Dv, Dp, C and the number of groups.
        dtypes: of the table, and of pre_input and out.

    Returns:
        Of slots, weights, grad_a, groups, grad_outs, pre_inputs, and the end: seven numbers.
    """
    require()
    shape = (ctypes.c_int64 * 7)(*sizes, *(DTYPE_CODES[dtype] for dtype in dtypes))
    sections = (ctypes.c_int64 * 7)()
    _c_functions().ultramem_factors_sections(shape, sections)
    return tuple(sections)


class FactorsState(NamedTuple):
    """What the host knows of an arena on a GPU, without waiting for it.

    Attributes:
        num_tokens: held.
        overflow: tokens that did not fit.
        captured: a CUDA graph that appends to it or clears it has been captured: the two above are
            not known.
        strangers: appends of the whole process to memory that is nobody's arena, which may have
            been a compiler's copy of this one; where their number has changed, likewise.
        appends: to it, launched or captured, since it was made.
    """

    num_tokens: int
    overflow: int
    captured: bool
    strangers: int
    appends: int


def factors_state(address: int) -> FactorsState:
    """Of the arena of factors that begins there."""
    state = (ctypes.c_int64 * 5)()
    _c_functions().ultramem_factors_state(ctypes.c_void_p(address), state)
    return FactorsState(state[0], state[1], bool(state[2]), state[3], state[4])


def set_factors_state(address: int, num_tokens: int, overflow: int, captured: bool) -> None:
    """Counts of an arena, from now on; captured: that is what a graph will do to it."""
    _c_functions().ultramem_factors_set(
        ctypes.c_void_p(address),
        ctypes.c_int64(num_tokens),
        ctypes.c_int64(overflow),
        ctypes.c_int32(captured),
    )


def capture_id(stream: int) -> int:
    """Which CUDA graph is being captured from the stream of that handle: a number that no other
    capture of the process has, 0 where there is none."""
    function = _c_functions().ultramem_capture_id
    function.restype = ctypes.c_uint64
    return function(ctypes.c_void_p(stream))


def forget_factors_state(address: int) -> None:
    """There is a new arena there, or none any more."""
    _c_functions().ultramem_factors_forget(ctypes.c_void_p(address))


class RetrievalShape(ctypes.Structure):
    """Sizes of a product_key_topk call; csrc/torch/introspection.cpp has the same fields."""

    _names = (
        *("num_tokens", "num_keys", "key_dim", "num_heads", "num_queries", "tucker_rank"),
        *("num_cores", "axis_topk", "topk", "additive", "dtype"),
    )
    _fields_ = [(name, ctypes.c_int64) for name in _names]
    # ultramem::DType
    DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def retrieval_path(shape: RetrievalShape, compute_capability: int) -> tuple[str, str]:
    """Which kernels product_key_topk's forward runs on a GPU of that compute capability, and why.

    The path is "generic", "tensor cores (sm_90)", "tensor cores, few tokens" or "tensor cores
    (sm_80)", of which the last two are for every GPU from sm_80 on.

    Args:
        compute_capability: 10 * major + minor. No such GPU needs to be there.
    """
    require()
    function = ctypes.CDLL(str(_PATH)).ultramem_product_key_topk_fwd_path
    function.restype = ctypes.c_char_p
    reason = ctypes.c_char_p()
    path = function(ctypes.byref(shape), compute_capability, ctypes.byref(reason))
    return path.decode(), (reason.value or b"").decode()


def retrieval_workspace(shape: RetrievalShape) -> tuple[int, int] | None:
    """Scratch bytes of product_key_topk's forward and of its backward on the current GPU.

    None where there is no GPU to ask, or no CUDA kernels.
    """
    require()
    if not (_has_cuda_kernels and torch.cuda.is_available()):
        return None
    function = ctypes.CDLL(str(_PATH)).ultramem_product_key_topk_workspace
    function.restype = ctypes.c_int64
    return function(ctypes.byref(shape), 0), function(ctypes.byref(shape), 1)
