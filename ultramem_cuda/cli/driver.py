"""The NVIDIA driver, asked without torch: which GPUs there are where torch cannot use them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

_LIBRARY = "libcuda.so.1"

# Of CUdevice_attribute and CUresult, in cuda.h.
_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76
_NO_DEVICE = 100


@dataclass(frozen=True)
class Gpu:
    """A GPU that the driver offers to this process."""

    name: str
    capability: tuple[int, int]


@dataclass(frozen=True)
class Driver:
    """What the driver says.

    Attributes:
        cuda_version: the newest CUDA that it runs; None without a driver.
        gpus: those it offers.
        error: why it offers none, in a few words; None where it offers some.
    """

    cuda_version: tuple[int, int] | None
    gpus: tuple[Gpu, ...]
    error: str | None


class _Refused(Exception):
    """A function of the driver has returned an error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def ask() -> Driver:
    """Loads the driver's library and asks it. Creates no context on a GPU."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        return Driver(None, (), f"no NVIDIA driver ({error})")
    version = None
    try:
        number = _number(library, "cuDriverGetVersion")
        version = (number // 1000, number % 1000 // 10)
        _call(library, "cuInit", ctypes.c_uint(0))
        gpus = tuple(_gpu(library, index) for index in range(_number(library, "cuDeviceGetCount")))
    except _Refused as error:
        if error.code != _NO_DEVICE:
            return Driver(version, (), f"the NVIDIA driver refuses: {error}")
        gpus = ()
    except AttributeError as error:
        return Driver(version, (), f"{_LIBRARY} is no NVIDIA driver ({error})")
    return Driver(version, gpus, None if gpus else "the NVIDIA driver finds no GPU")


def _gpu(library: ctypes.CDLL, index: int) -> Gpu:
    device = _number(library, "cuDeviceGet", ctypes.c_int(index))
    name = ctypes.create_string_buffer(256)
    _call(library, "cuDeviceGetName", name, ctypes.c_int(len(name)), ctypes.c_int(device))
    major, minor = (
        _number(library, "cuDeviceGetAttribute", ctypes.c_int(attribute), ctypes.c_int(device))
        for attribute in (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR)
    )
    return Gpu(name.value.decode(errors="replace"), (major, minor))


def _number(library: ctypes.CDLL, function: str, *arguments: object) -> int:
    """The number that a function writes where its first argument points."""
    number = ctypes.c_int()
    _call(library, function, ctypes.byref(number), *arguments)
    return number.value


def _call(library: ctypes.CDLL, function: str, *arguments: object) -> None:
    code = int(getattr(library, function)(*arguments))
    if code:
        message = ctypes.c_char_p()
        library.cuGetErrorString(ctypes.c_int(code), ctypes.byref(message))
        raise _Refused(code, (message.value or b"unknown error").decode() + f" (error {code})")
