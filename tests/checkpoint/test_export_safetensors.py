"""export_safetensors and load_safetensors in one process."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_model import CONFIG, Model, make_model, make_optimizers, same_tensors, train
from torch import nn

import ultramem_cuda as um
from ultramem_cuda.checkpoint import _safetensors

safetensors = pytest.importorskip("safetensors")
pytest.importorskip("safetensors.torch")

EXPORT = um.checkpoint.export_safetensors
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def mixed_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"floats.{dtype}": torch.randn(7, 3, generator=generator).to(dtype) for dtype in DTYPES
    }
    tensors |= {
        f"integers.{dtype}": torch.randint(0, 2, (3, 5, 2), generator=generator).to(dtype)
        for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    }
    tensors["scalar"] = torch.tensor(2.5)
    tensors["none"] = torch.ones(0, 4)
    tensors["transposed"] = torch.arange(12.0).view(3, 4).T
    return tensors


def test_the_library_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_safetensors, "_PIECE_BYTES", 16)
    tensors = mixed_tensors()
    path = EXPORT(tmp_path / "a", tensors)
    assert [p.name for p in path.iterdir()] == ["model.safetensors"]
    assert same_tensors(safetensors.torch.load_file(path / "model.safetensors"), tensors)
    with safetensors.safe_open(path / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert torch.equal(file.get_tensor("transposed"), tensors["transposed"])
    # As the library itself lays a file out: no gaps, wide types first.
    ours = (path / "model.safetensors").read_bytes()
    theirs = safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()})
    data = [content[8 + int.from_bytes(content[:8], "little") :] for content in (ours, theirs)]
    assert len(data[0]) == len(data[1])
    assert len(ours) % 8 == len(data[0]) % 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_effective_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    def made(**arguments: Any) -> Model:
        model = make_model(**arguments)
        (model if dtype == torch.float64 else model.table).to(dtype)
        return model

    model = made(grad_mode="deferred")
    train(model, make_optimizers(model))
    assert (model.table.scale < 1).all()
    path = EXPORT(tmp_path / "a", model)
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    expected = made()
    expected.load_state_dict(model.state_dict())
    assert same_tensors(tensors, expected.state_dict())
    assert tensors["table.values"].dtype == dtype

    for grad_mode in ("dense", "deferred"):
        other = made(seed=1, grad_mode=grad_mode)
        um.checkpoint.load_safetensors(path, other)
        assert torch.equal(other.table.values, expected.table.values)
        assert grad_mode == "dense" or (other.table.scale == 1).all()
    # A state dict is the same, but for the configurations.
    same = EXPORT(tmp_path / "b", model.state_dict())
    assert same_tensors(safetensors.torch.load_file(same / "model.safetensors"), tensors)


def test_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_safetensors, "_PIECE_BYTES", 100)
    model = make_model()
    path = EXPORT(tmp_path / "a", model, max_shard_bytes=3000)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(p.name for p in path.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["weight_map"].keys() == model.state_dict().keys()
    sizes = {name: t.numel() * t.element_size() for name, t in model.state_dict().items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    for file in files:
        names = safetensors.torch.load_file(path / file).keys()
        assert len(names) == 1 or sum(sizes[name] for name in names) <= 3000
    assert sizes["table.values"] > 3000  # and is alone

    other = make_model(seed=1)
    um.checkpoint.load_safetensors(path, other)
    assert same_tensors(other.state_dict(), model.state_dict())


def test_files_of_others(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    # The library refuses tied weights; those who save them leave one out.
    safetensors.torch.save_file({"0.weight": torch.ones(5, 4)}, tmp_path / "w.safetensors")
    um.checkpoint.load_safetensors(tmp_path / "w.safetensors", model)
    assert (model[1].weight == 1).all()


def test_configuration_is_in_the_files(tmp_path: Path) -> None:
    path = EXPORT(tmp_path / "a", make_model())
    with safetensors.safe_open(path / "model.safetensors", "pt") as file:
        layers = json.loads(file.metadata()["ultramem_cuda"])["layers"]
    assert um.UltraMemConfig.from_dict(layers["layers.1"]["config"]) == CONFIG
    assert layers["layers.1"]["layer_index"] == 1
    other = make_model(seed=1, config=dataclasses.replace(CONFIG, seed=9))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"^seed: memory layer layers\.0 has 9"):
        um.checkpoint.load_safetensors(path, other)
    assert same_tensors(other.state_dict(), before)
    um.checkpoint.load_safetensors(path, other, check_config=False)
    assert same_tensors(other.state_dict(), make_model().state_dict())


def test_what_does_not_fit(tmp_path: Path) -> None:
    path = EXPORT(tmp_path / "a", make_model())

    def check(message: str, other: nn.Module) -> None:
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            um.checkpoint.load_safetensors(path, other)
        assert same_tensors(other.state_dict(), before)

    other = make_model(seed=1)
    other.head = nn.Linear(16, 21, bias=False)
    check(r"head\.weight has shape \[21, 16\], in the files \[20, 16\]", other)
    del other.head
    check(r"has no tensor head\.weight, which the files hold", other)
    other = make_model(seed=1)
    other.extra = nn.Linear(2, 2)
    check(r"the files lack extra\.bias, which the model has", other)
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        um.checkpoint.load_safetensors(tmp_path, other)


def test_bad_arguments(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        EXPORT(tmp_path / "there", make_model())
    with pytest.raises(ValueError, match="max_shard_bytes: must be at least 1"):
        EXPORT(tmp_path / "a", make_model(), max_shard_bytes=0)
    with pytest.raises(TypeError, match=r"x is torch\.complex64"):
        EXPORT(tmp_path / "a", {"x": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(TypeError, match="x must be a tensor, got int"):
        EXPORT(tmp_path / "a", {"x": 3})
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    path = EXPORT(tmp_path / "a", make_model())
    with pytest.raises(ImportError, match=r"pip install 'ultramem_cuda\[safetensors\]'"):
        um.checkpoint.load_safetensors(path, make_model())
