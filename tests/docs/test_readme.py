"""The examples of the README and of the guide run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
