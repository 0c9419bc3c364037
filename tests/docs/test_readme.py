"""The examples of the README and of the guide run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

README = Path(__file__).parents[2] / "README.md"


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def test_readme_layers() -> None:
    names: dict[str, object] = {}
    exec(python_blocks(README)[0], names)
    layers = names["layers"]
    assert isinstance(layers, list)
    assert names["table"].values.grad.any()
    assert all(layer.keys.grad.any() for layer in layers)


def test_readme_operators() -> None:
    names: dict[str, object] = {}
    _, operators = python_blocks(README)
    exec(operators, names)
    assert names["query"].shape == (512, 2, 1, 2, 64)
    assert names["scores"].shape == (512, 32, 2)
    assert names["out"].shape == (512, 192)


def test_training_guide() -> None:
    names: dict[str, object] = {}
    blocks = python_blocks(README.parent / "docs" / "training.md")
    for block in blocks[:4]:
        exec(block, names)
    table = names["model"].table
    # The fourth block trained the table from its main_grad, and emptied it again.
    assert table.values.grad is None
    assert not table.values.main_grad.any()
    assert all(names["optimizer"].state[p]["step"] == 2 for p in table.parameters())
    for block in blocks[4:]:
        exec(block, names)
    assert len(names["usage"]) == len(names["key_usage"]) == 3


def test_checkpoints_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(README.parent / "tests" / "checkpoint")
    import published

    names: dict[str, object] = {}
    for block in python_blocks(README.parent / "docs" / "checkpoints.md"):
        exec(block, names)
    model, other = names["model"], names["other"]
    scale = model.table.scale[0]
    assert scale < 1
    assert names["torch"].equal(other.table.values, (model.table.values.double() * scale).float())
    options = published.options()
    table, layers = names["from_release"](published.state_dict(options), options)
    assert layers[0](published.tokens(options), table).shape == (40, 24)


def test_compile_guide() -> None:
    torch._dynamo.reset()
    counters.clear()
    names: dict[str, object] = {}
    for block in python_blocks(README.parent / "docs" / "compile.md"):
        exec(block, names)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1  # of three blocks
    assert all(layer.memory.keys.grad.any() for layer in names["model"].blocks)
    assert names["loaded"](torch.zeros(3, 64)).shape == (3, 64)


def test_parallel_page() -> None:
    names: dict[str, object] = {}
    try:
        for block in python_blocks(README.parent / "docs" / "parallel.md"):
            exec(block, names)
        tables = [module.values for module in names["model"].modules() if hasattr(module, "values")]
        assert [type(values).__name__ for values in tables] == ["DTensor"]
        assert names["optimizer"].state
    finally:
        torch.distributed.destroy_process_group()


def test_transformers_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5.0")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in python_blocks(README.parent / "docs" / "transformers.md"):
        exec(block, names)
    assert names["a"].shape == (1, 11)
    assert (tmp_path / "with-memory" / "config.json").is_file()


def test_links_lead_somewhere() -> None:
    pages = [README, *README.parent.glob("docs/*.md"), README.parent / "CONTRIBUTING.md"]
    links = [
        (page, link)
        for page in pages
        for link in re.findall(r"\]\(([^)#]+)\)", without_code(page.read_text()))
        if "://" not in link
    ]
    assert links
    for page, link in links:
        assert (page.parent / link).exists(), f"{page.name}: {link}"
