"""Inference graphs by torch.export: saved, loaded, run with other numbers of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from module_cases import small_config, tokens
from torch import Tensor, nn

import ultramem_cuda as um

WIDTH = 24


class Model(nn.Module):
    def __init__(self, grad_mode: str = "dense", **overrides: Any) -> None:
        super().__init__()
        config = small_config(num_layers=2, **overrides)
        torch.manual_seed(0)
        self.table = um.MemoryTable.from_config(config, grad_mode=grad_mode)
        self.memory = nn.ModuleList(um.UltraMemLayer(config, i) for i in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.memory:
            x = x + layer(x, self.table)
        return x


def exported(model: nn.Module, strict: bool, device: str = "cpu") -> torch.export.ExportedProgram:
    dynamic = ({0: torch.export.Dim("tokens")},)
    with torch.no_grad():
        return torch.export.export(
            model.eval(), (tokens(5, WIDTH).to(device),), dynamic_shapes=dynamic, strict=strict
        )


def called(program: torch.export.ExportedProgram) -> set[str]:
    """The operators of this package that a program calls."""
    targets = [node.target for node in program.graph.nodes]
    return {t._opname for t in targets if getattr(t, "namespace", None) == "ultramem"}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("grad_mode", ["dense", "deferred"])
def test_saved_and_loaded(grad_mode: str, strict: bool, tmp_path: Path) -> None:
    model = Model(grad_mode)
    if model.table.scale is not None:
        model.table.scale.copy_(torch.tensor([0.5, 0.75]))
    program = exported(model, strict)
    torch.export.save(program, tmp_path / "memory.pt2")
    loaded = torch.export.load(tmp_path / "memory.pt2").module()
    for size in (0, 1, 5, 33):
        x = tokens(size, WIDTH)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), model(x))
    # Offsets and seeds are numbers in it: nothing is placed apart.
    assert called(program) == {*("tucker_query", "rms_norm", "product_key_topk", "value_ffn")}
    assert not any("_placement" in name for name in program.state_dict)


def test_other_layers() -> None:
    """Additive mode without pre-values; an explicit permutation; groups apart."""
    for overrides in (
        {"shuffle": "permutation", "key_expand": 2, "num_slots": 600, "sum_groups": False},
        {"mode": "additive", "tucker_rank": 1, "num_cores": 1, "pre_value_dim": 0, "axis_topk": 7},
    ):
        model = Model(**overrides)
        program = exported(model, strict=False).module()
        for size in (1, 12):
            x = tokens(size, WIDTH)
            with torch.no_grad():
                torch.testing.assert_close(program(x), model(x))


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.__version__ < torch.torch_version.TorchVersion("2.13"),
    reason="AOTInductor of torch 2.11 ends the process with a fatal error",
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_compiled_ahead_of_time(device: str, tmp_path: Path) -> None:
    """Without a GPU, too, but it takes the C++ compiler most of a minute."""
    model = Model().to(device)
    path = torch._inductor.aoti_compile_and_package(
        exported(model, strict=False, device=device), package_path=str(tmp_path / "memory.pt2")
    )
    run = torch._inductor.aoti_load_package(path)
    for size in (1, 5, 33):
        x = tokens(size, WIDTH).to(device)
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
