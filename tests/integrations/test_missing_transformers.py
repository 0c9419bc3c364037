"""Without transformers the rest works, and the bridge says what it needs."""

from __future__ import annotations

import importlib
import sys

import pytest

BRIDGE = "ultramem_cuda.integrations.transformers"


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, BRIDGE, raising=False)
    with pytest.raises(ImportError, match=r'pip install "ultramem_cuda\[transformers\]"'):
        importlib.import_module(BRIDGE)
