"""The core needs torch and NumPy alone; whatever needs more says what is missing."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Collection
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from ultramem_cuda import _extras
from ultramem_cuda._extras import EXTRAS, Extra

ROOT = Path(__file__).resolve().parents[1]


class Hiding:
    """A finder of modules, less some packages: as if they were not installed."""

    def __init__(self, finder: Any, packages: Collection[str]) -> None:
        self.finder = finder
        self.packages = packages

    def find_spec(self, name: str, *arguments: Any) -> ModuleSpec | None:
        if name.partition(".")[0] in self.packages:
            return None
        found: ModuleSpec | None = self.finder.find_spec(name, *arguments)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


@pytest.fixture(params=EXTRAS, ids=lambda extra: extra.name)
def absent(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Extra:
    """An extra whose package cannot be imported."""
    extra: Extra = request.param
    for name in [n for n in sys.modules if n.partition(".")[0] == extra.module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(
        sys, "meta_path", [Hiding(finder, {extra.module}) for finder in sys.meta_path]
    )
    return extra


def test_what_is_missing_and_how_to_install_it(absent: Extra) -> None:
    assert not absent.is_installed()
    with pytest.raises(ModuleNotFoundError) as refused:
        _extras.require(absent.module, extra=absent.name)
    message = str(refused.value)
    assert message.startswith(f"{absent.distribution} is not installed")
    assert absent.gives in message
    assert message.endswith(f'pip install "ultramem_cuda[{absent.name}]"')
    assert refused.value.name == absent.module


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file of an optional package that is installed."""
    file = tmp_path / "optional_stand_in.py"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        _extras, "EXTRAS", (Extra("wings", "optional_stand_in", "stand-in", "wings"),)
    )
    monkeypatch.delitem(sys.modules, "optional_stand_in", raising=False)
    return file


def test_what_is_there_is_imported(stand_in: Path) -> None:
    stand_in.write_text("value = 5\n")
    assert _extras.EXTRAS[0].is_installed()
    assert _extras.require("optional_stand_in", extra="wings").value == 5


def test_a_broken_package_reports_its_own_error(stand_in: Path) -> None:
    stand_in.write_text("import a_module_that_it_lacks\n")
    with pytest.raises(ModuleNotFoundError, match="No module named 'a_module_that_it_lacks'"):
        _extras.require("optional_stand_in", extra="wings")


def test_pyproject_offers_every_extra() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for extra in EXTRAS:
        (packages,) = re.findall(rf"^{extra.name} = \[(.*)\]$", project, re.MULTILINE)
        assert re.match(rf'"{extra.distribution}(>=[\d.]+)?(,<\d+)?"$', packages), extra
    (together,) = re.findall(r'^all = \["ultramem_cuda\[(.*)\]"\]$', project, re.MULTILINE)
    assert sorted(together.split(",")) == sorted(extra.name for extra in EXTRAS)


CORE = (
    f"""
from __future__ import annotations
import sys
from collections.abc import Collection
from importlib.machinery import ModuleSpec
from typing import Any

{inspect.getsource(Hiding)}
"""
    """
# Also those that the packages of the extras bring, and what is often installed beside torch.
NAMES = ("pynvml", "transformers", "safetensors", "matplotlib", "huggingface_hub", "tokenizers")
NAMES += ("rich", "pandas", "scipy", "PIL", "yaml", "tqdm")
sys.meta_path[:] = [Hiding(finder, NAMES) for finder in sys.meta_path]

import torch
import ultramem_cuda as um
from ultramem_cuda import ops

assert "ultramem_cuda.cli" not in sys.modules, "the command's modules"
imported = {name.split(".")[0] for name in sys.modules}
assert not imported & set(NAMES), imported & set(NAMES)

x, weight, norm_weight = torch.randn(5, 16), torch.randn(2 * 2 * 8, 16), torch.ones(8)
keys, core = torch.randn(1, 2, 2, 8, 8), torch.rand(1, 1, 2, 2)
for tensor in (x, weight, norm_weight, keys, core):
    tensor.requires_grad_()
u, t, _ = ops.tucker_filter(core)
query = ops.tucker_query(x, weight, norm_weight)
scores, indices, rows = ops.product_key_topk(query, keys, core, topk=4, return_axis_indices=True)
values, pre_values = (torch.randn(64, 8, requires_grad=True) for _ in range(2))
out = ops.value_ffn(indices.flatten(1), scores.flatten(1, 2), values, pre_values,
                    torch.randn(5, 8), activation="gelu")
loss = ops.rms_norm(out, torch.ones(8)).sum()
loss = loss + ops.key_balance_loss(query, keys, rows, u=u, t=t).sum()
loss.backward()
for tensor in (x, weight, keys, core, values, pre_values):
    assert tensor.grad is not None and tensor.grad.isfinite().all()

config = um.UltraMemConfig(d_model=16, num_layers=1, num_keys=8, key_dim=8, tucker_rank=2,
                           num_cores=1, topk=4, pre_value_dim=8, value_dim=8, num_slots=64)
table, layer = um.MemoryTable.from_config(config), um.UltraMemLayer(config, layer_index=0)
layer(x.detach(), table).square().sum().backward()
um.optim.MemoryAdam(table.parameters(), lr=1e-3).step()
print("done")
"""
)


def test_operators_layers_and_optimizers_need_no_optional_package(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CORE],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
