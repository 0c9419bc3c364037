"""What `require` says where operators cannot run."""

from __future__ import annotations

import pytest

from ultramem_cuda import _library


def test_cuda_tensors_are_refused_by_a_cpu_only_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_has_cuda_kernels", False)
    _library.require("cpu")
    with pytest.raises(RuntimeError, match="this build is CPU-only, so CUDA tensors are refused"):
        _library.require("cuda")
