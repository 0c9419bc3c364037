"""The README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = Path(__file__).parents[2] / "README.md"


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def test_readme_examples() -> None:
    first, second = python_blocks()
    names: dict[str, object] = {}
    exec(first, names)
    layers = names["layers"]
    assert isinstance(layers, list)
    assert names["table"].values.grad.any()
    assert layers[0].keys.grad.any()

    # The second example takes tensors of the reader's own; these are the smallest that fit.
    names |= {
        "x": torch.randn(3, 8),
        "weight": torch.randn(2 * 2 * 4, 8),
        "norm_weight": torch.ones(4),
        "keys": torch.randn(1, 2, 2, 9, 4),
        "core": torch.rand(2, 1, 2, 2),
        "values": torch.randn(81, 6),
        "pre_values": torch.randn(81, 5),
        "pre_input": torch.randn(3, 5),
    }
    exec(second.replace("topk=32", "topk=4"), names)
    assert names["out"].shape == (3, 6)
    assert names["scores"].shape == (3, 1, 4, 2)


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
