"""What all tests share: devices, the marker `gpu`, hypothesis profiles, the count of band use."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator
from functools import cache
from typing import Any

import helpers
import hypothesis
import pytest
import torch

from ultramem_cuda import _library

# No deadlines: the first call of an operator loads code. The same examples in every run, so that a
# failure here is a failure everywhere: ci draws fewer than gpu, the default where there is one;
# HYPOTHESIS_PROFILE=thorough looks for new ones, and brief is for tests/sanitize.sh.
_COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow],
}
hypothesis.settings.register_profile("gpu", max_examples=30, derandomize=True, **_COMMON)
hypothesis.settings.register_profile("ci", max_examples=15, derandomize=True, **_COMMON)
hypothesis.settings.register_profile("brief", max_examples=4, derandomize=True, **_COMMON)
hypothesis.settings.register_profile("thorough", max_examples=500, print_blob=True, **_COMMON)
_PROFILE = "gpu" if torch.cuda.is_available() else "ci"
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", _PROFILE))

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _why_no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA GPU on this machine"
    if not _library.has_cuda_kernels():
        return "this build has no CUDA kernels"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") is not None and (reason := _why_no_gpu()):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    # Thousands of tests and all that they import stay to the end: no collection of garbage need
    # walk through them.
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="module")
def quick_collections() -> None:
    """For tests of benches, which ask for many collections of garbage: what there is by now, of
    imports and compilations before, stays to the end."""
    gc.collect()
    gc.freeze()


# Session-scoped, because hypothesis refuses fixtures that it would have to make anew per example.
@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Every device that the operators run on."""
    return request.param


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # Most tensors here are tiny: waking a thread pool for each of them takes most of the time.
    # Tests of threads set their own number.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _device_dtype(device: str, dtype: torch.dtype) -> object:
    marks = [pytest.mark.gpu] if device == "cuda" else []
    return pytest.param((device, dtype), id=f"{device}-{helpers.short_name(dtype)}", marks=marks)


@pytest.fixture(
    scope="session",
    params=[
        *(_device_dtype("cpu", dtype) for dtype in _CPU_DTYPES),
        *(_device_dtype("cuda", dtype) for dtype in _CUDA_DTYPES),
    ],
)
def device_dtype(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    """Every device with every dtype that it is offered in."""
    return request.param


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.getoption("dist") != "loadfile":
        return None
    from file_schedule import FileSchedule

    return FileSchedule(config, log)


def pytest_sessionfinish(session: pytest.Session) -> None:
    # One of several processes (pytest-xdist) hands its counts to the one that prints.
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["band_use"] = {name: (u.kept, u.band_used) for name, u in helpers.BAND_USE.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    # A process that crashed has no output.
    for device, counts in getattr(node, "workeroutput", {}).get("band_use", {}).items():
        helpers.BAND_USE[device].add(*counts)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for device, use in sorted(helpers.BAND_USE.items()):
        terminalreporter.write_line(
            f"product_key_topk on {device}: {use.kept} kept slots held against the reference, "
            f"{use.band_used} of them differ within the error band"
        )
