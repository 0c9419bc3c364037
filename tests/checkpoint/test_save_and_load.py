"""save and load in one process: what comes back, what raises, what an interruption leaves."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from small_model import CONFIG, make_model, make_optimizers, same_states, same_tensors, train
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import ultramem_cuda as um
from ultramem_cuda.checkpoint import _pieces, _sharded


@pytest.mark.parametrize(
    ("grad_mode", "optimizer"),
    [
        ("dense", um.optim.MemoryAdam),
        ("deferred", um.optim.MemoryAdam),
        ("deferred", um.optim.MemoryAdagrad),
        ("deferred", um.optim.MemorySGD),
    ],
)
def test_training_goes_on(
    grad_mode: str, optimizer: type[um.optim.memory.MemoryOptimizer], tmp_path: Path
) -> None:
    model = make_model(grad_mode=grad_mode)
    optimizers = make_optimizers(model, optimizer)
    train(model, optimizers)
    path = um.checkpoint.save(tmp_path / "a", model, optimizers, step=2)

    other = make_model(seed=1, grad_mode=grad_mode)
    others = make_optimizers(other, optimizer)
    for group in others[0].param_groups:
        group["lr"] = 5.0
    found = um.checkpoint.load(path, other, others)
    assert (found.step, found.world_size, found.extra) == (2, 1, {})
    assert same_tensors(other.state_dict(), model.state_dict())
    for mine, theirs in zip(others, optimizers, strict=True):
        assert same_states(mine, theirs)
    assert train(other, others) == train(model, optimizers)
    # Once more into optimizers that have states already.
    um.checkpoint.load(path, other, others)
    um.checkpoint.load(path, model, optimizers)
    assert train(other, others) == train(model, optimizers)


def test_tables_of_either_kind(tmp_path: Path) -> None:
    deferred = make_model(grad_mode="deferred")
    train(deferred, make_optimizers(deferred))
    assert (deferred.table.scale < 1).all()
    path = um.checkpoint.save(tmp_path / "deferred", deferred)
    dense = make_model(seed=1)
    um.checkpoint.load(path, dense)
    expected = make_model(seed=2)
    expected.load_state_dict(deferred.state_dict())
    assert same_tensors(dense.state_dict(), expected.state_dict())

    um.checkpoint.save(tmp_path / "dense", dense)
    um.checkpoint.load(tmp_path / "dense", deferred)
    assert torch.equal(deferred.table.values, dense.table.values)
    assert torch.equal(deferred.table.scale, torch.ones(2, dtype=torch.float64))


def test_master_weights_follow_another_kind_of_table(tmp_path: Path) -> None:
    def made(grad_mode: str) -> tuple[Any, um.optim.MemoryAdam]:
        model = make_model(grad_mode=grad_mode)
        model.table.to(torch.bfloat16)
        optimizer = um.optim.MemoryAdam(
            model.table.parameters(), lr=1e-2, weight_decay=0.1, master_weights=True
        )
        return model, optimizer

    model, optimizer = made("deferred")
    train(model, [optimizer])
    um.checkpoint.save(tmp_path / "a", model, optimizer)
    dense, dense_optimizer = made("dense")
    um.checkpoint.load(tmp_path / "a", dense, dense_optimizer)
    train(dense, [dense_optimizer], steps=1)
    master = dense_optimizer.state[dense.table.values]["master"]
    effective = optimizer.state[model.table.values]["master"] * model.table.scale[0]
    # One step of Adam apart, not a scale.
    assert (master - effective).abs().max() <= 1.1e-2
    assert "master_scale" not in dense_optimizer.state[dense.table.values]


def test_another_dtype(tmp_path: Path) -> None:
    model = make_model()
    um.checkpoint.save(tmp_path / "a", model)
    other = make_model(seed=1).bfloat16()
    um.checkpoint.load(tmp_path / "a", other)
    assert torch.equal(other.table.values, model.table.values.bfloat16())


def test_names_do_not_show_wrappers(tmp_path: Path) -> None:
    model = make_model()
    optimizers = make_optimizers(model)
    train(model, optimizers)
    wrapped = make_model(seed=1)
    wrapped_optimizers = make_optimizers(wrapped)
    wrapped.layers[0] = checkpoint_wrapper(wrapped.layers[0])
    container: nn.Module = torch.compile(nn.DataParallel(wrapped), backend="eager")
    um.checkpoint.save(tmp_path / "a", model, optimizers)
    um.checkpoint.load(tmp_path / "a", container, wrapped_optimizers)
    assert same_tensors(wrapped.state_dict(), model.state_dict())
    um.checkpoint.save(tmp_path / "b", container, wrapped_optimizers)
    names = [json.loads((tmp_path / d / "ultramem.json").read_text()) for d in "ab"]
    assert names[0]["layers"] == names[1]["layers"]
    assert names[0]["optimizers"] == names[1]["optimizers"]
    um.checkpoint.load(tmp_path / "b", model, optimizers)
    assert same_tensors(wrapped.state_dict(), model.state_dict())


def test_eval_caches_and_permutations_follow(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, shuffle="permutation")
    model = make_model(config=config).eval()
    other = make_model(seed=1, config=dataclasses.replace(config, seed=4)).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = other(ids)
        um.checkpoint.save(tmp_path / "a", model)
        um.checkpoint.load(tmp_path / "a", other)
        assert torch.equal(other(ids), model(ids))
        assert not torch.equal(other(ids), before)
    assert other.layers[1].addressing == model.layers[1].addressing


def test_extra(tmp_path: Path) -> None:
    model = make_model()
    extra = {"rng": torch.get_rng_state(), "data": {"epoch": 3, "seen": [1, 2]}, "name": "x"}
    path = um.checkpoint.save(tmp_path / "a", model, extra=extra)
    found = um.checkpoint.load(path, model)
    assert torch.equal(found.extra.pop("rng"), extra["rng"])
    assert found.extra == {"data": {"epoch": 3, "seen": [1, 2]}, "name": "x"}
    assert um.checkpoint.read_extra(path, 7) == {}
    with pytest.raises(TypeError, match="extra: must hold tensors"):
        um.checkpoint.save(tmp_path / "b", model, extra={"path": Path("x")})
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("seed", {"seed": 4}),
        ("shuffle", {"shuffle": "none"}),
        ("topology", {"topology": "noring"}),
        ("topk", {"topk": 5}),
        ("axis_topk", {"axis_topk": 5}),
        ("activation", {"activation": "gelu"}),
        ("eps", {"eps": 1e-5}),
    ],
)
def test_another_configuration(field: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = make_model()
    um.checkpoint.save(tmp_path / "a", model)
    other = make_model(seed=1, config=dataclasses.replace(CONFIG, **changes))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=f"^{field}: memory layer layers.0"):
        um.checkpoint.load(tmp_path / "a", other)
    assert same_tensors(other.state_dict(), before)
    if "shuffle" not in changes:
        um.checkpoint.load(tmp_path / "a", other, check_config=False)
        assert same_tensors(other.state_dict(), model.state_dict())


def test_layers_in_another_order(tmp_path: Path) -> None:
    um.checkpoint.save(tmp_path / "a", make_model())
    other = make_model()
    other.layers = nn.ModuleList(um.UltraMemLayer(CONFIG, i) for i in (1, 0))
    with pytest.raises(ValueError, match=r"^layer_index: memory layer layers\.0 has 1"):
        um.checkpoint.load(tmp_path / "a", other)


def test_options_of_training_may_differ(tmp_path: Path) -> None:
    um.checkpoint.save(tmp_path / "a", make_model())
    config = dataclasses.replace(CONFIG, key_balance=0.1, tucker_penalty=0.1, axis_topk=6)
    um.checkpoint.load(tmp_path / "a", make_model(config=config))


def test_what_does_not_fit(tmp_path: Path) -> None:
    model = make_model()
    optimizers = make_optimizers(model)
    um.checkpoint.save(tmp_path / "bare", model)
    train(model, optimizers)
    um.checkpoint.save(tmp_path / "a", model, optimizers)

    def check(message: str, other: nn.Module, others: Any = None, path: str = "a") -> None:
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            um.checkpoint.load(tmp_path / path, other, others)
        assert same_tensors(other.state_dict(), before)

    other = make_model(seed=1)
    check("the checkpoint was saved without one", other, make_optimizers(other), "bare")
    check("has the states of 2, got 1", other, make_optimizers(other)[:1])
    check("has states of AdamW, got a MemoryAdam", other, make_optimizers(other)[::-1])
    network, table = make_optimizers(other)
    del network.param_groups[0]["params"][0]
    check(r"embedding\.weight in the checkpoint alone", other, [network, table])
    check("is in two optimizers", other, [table, table])
    check("is not one of the model", other, make_optimizers(make_model()))
    other.extra = nn.Linear(2, 2)
    check(r"in the model alone, not in the checkpoint: extra\.bias", other)
    other = make_model(seed=1)
    other.head = nn.Linear(16, 21, bias=False)
    check(r"head\.weight has shape \[21, 16\], in the checkpoint \[20, 16\]", other)
    del other.head
    check(r"in the checkpoint alone, not in the model: head\.weight", other)
    with pytest.raises(ValueError, match=r"is on the meta device"):
        um.checkpoint.load(tmp_path / "a", make_model().to("meta"))


def test_format_version(tmp_path: Path) -> None:
    model = make_model()
    path = um.checkpoint.save(tmp_path / "a", model)
    manifest = path / "ultramem.json"
    content = json.loads(manifest.read_text())
    assert content["format_version"] == 1
    manifest.write_text(json.dumps({**content, "format_version": 2, "ultramem_cuda": "9.1"}))
    with pytest.raises(ValueError, match=r"is in format 2, written by ultramem_cuda 9\.1"):
        um.checkpoint.load(path, model)
    manifest.unlink()
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        um.checkpoint.load(path, model)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    model = make_model()
    path = um.checkpoint.save(tmp_path / "a", model)
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        um.checkpoint.save(path, make_model(seed=1))
    other = make_model(seed=1)
    um.checkpoint.load(path, other)
    assert same_tensors(other.state_dict(), model.state_dict())


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(_sharded, "write_file", full)
        with pytest.raises(OSError, match="no space left"):
            um.checkpoint.save(tmp_path / "a", make_model())
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(_pieces.PiecewiseSavePlanner, "resolve_data", full)
        with pytest.raises(RuntimeError, match="rank 0 failed: OSError: no space left"):
            um.checkpoint.save(tmp_path / "a", make_model())
    assert list(tmp_path.iterdir()) == []


def test_latest_and_keep_last(tmp_path: Path) -> None:
    assert um.checkpoint.latest(tmp_path / "nowhere") is None
    model = make_model()
    (tmp_path / "notes").mkdir()
    (tmp_path / ".killed.incomplete").mkdir()
    (tmp_path / ".killed.incomplete" / "ultramem.json").write_text("{")
    for step in (30, 10, 20):  # the run went back to step 0 after 30
        path = um.checkpoint.save(tmp_path / f"step-{step}", model, step=step)
        assert um.checkpoint.latest(tmp_path) == path
    um.checkpoint.save(tmp_path / "step-40", model, keep_last=2)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"notes", "step-20", "step-40"}
    with pytest.raises(ValueError, match="keep_last: must be at least 1"):
        um.checkpoint.save(tmp_path / "step-50", model, keep_last=0)


def test_large_tensors_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In pieces of any size, of tensors of any shape, the same comes back.
    monkeypatch.setattr(_pieces, "PIECE_BYTES", 100)
    monkeypatch.setattr(_pieces, "MAX_PIECES", 7)
    model = make_model()
    optimizers = make_optimizers(model)
    train(model, optimizers)
    um.checkpoint.save(tmp_path / "a", model, optimizers)
    chunks = {
        name: len(entry.chunks)
        for name, entry in torch.distributed.checkpoint.FileSystemReader(tmp_path / "a")
        .read_metadata()
        .state_dict_metadata.items()
    }
    assert chunks["model.table.values"] == 8
    assert chunks["model.layers.0.keys"] == 12
    assert chunks["model.layers.0.query_norm"] == 1
    other = make_model(seed=1)
    others = make_optimizers(other)
    um.checkpoint.load(tmp_path / "a", other, others)
    assert same_tensors(other.state_dict(), model.state_dict())
    assert same_states(others[1], optimizers[1])


def test_files_are_on_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def recording(descriptor: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        assert not (tmp_path / "a").exists() or synced[-1] == tmp_path.name
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recording)
    path = um.checkpoint.save(tmp_path / "a", make_model(), extra={"x": 1})
    written = {p.name for p in path.iterdir()}
    assert written == {".metadata", "__0_0.distcp", "extra-00000.pt", "ultramem.json"}
    assert written - {".metadata"} <= set(synced)
    assert ".metadata.tmp" in synced
    assert synced[-2:] == [".a.incomplete", tmp_path.name]
