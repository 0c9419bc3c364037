"""What a profile covers, and what it refuses to."""

from __future__ import annotations

from typing import Any

import pytest

from ultramem_cuda.profiling.presets import NAMES
from ultramem_cuda.profiling.settings import Settings, SettingsError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"presets": ()}, "presets: must not be empty"),
        ({"presets": ("1B",)}, "presets: must be among 227M-1.2B, 1B-7B, got '1B'"),
        ({"presets": ("1B-7B", "1B-7B")}, "presets: must be different"),
        ({"subjects": ("moe", "mlp")}, "subjects: must be among memory, ffn, .*, got 'mlp'"),
        (
            {"presets": ("227M-1.2B",), "subjects": ("moe-matched",)},
            "subjects: must be among .*, got 'moe-matched'",
        ),
        ({"decode_tokens": (1, 0)}, "decode_tokens: must be positive, got 0"),
        ({"training_tokens": (-8,)}, "training_tokens: must be positive, got -8"),
        ({"decode_tokens": (4, 4)}, "decode_tokens: must be different, got 4, 4"),
        ({"agreement_targets": ("moe", "sort")}, "agreement_targets: must be among copy, "),
        ({"repeats": 1}, "repeats: must be at least 2, got 1"),
        ({"window_seconds": 0.5}, "window_seconds: must be at least 1, got 0.5"),
        ({"window_seconds": float("nan")}, "window_seconds: must be at least 1, got nan"),
    ],
)
def test_what_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=f"^{message}") as raised:
        Settings(**changes)
    assert raised.value.name in changes


def test_everything_by_default() -> None:
    presets = Settings().chosen_presets()
    assert tuple(preset.name for preset in presets) == NAMES
    assert all(len(preset.comparisons) >= 3 for preset in presets)


def test_chosen_subjects() -> None:
    small, large = Settings(subjects=("block", "moe", "pkm", "moe-matched")).chosen_presets()
    assert [case.name for case in large.cases] == ["block", "moe", "moe-matched", "pkm"]
    assert list(large.comparisons) == [("block", "moe"), ("block", "moe-matched")]
    assert list(small.comparisons) == [("block", "moe")]
    (only,) = Settings(subjects=("moe-matched",)).chosen_presets()
    assert only.name == "1B-7B"


def test_windows() -> None:
    usual = Settings()
    for subject in ("block", "moe"):
        for tokens in (64, 8192):
            assert tokens in usual.decode_tokens
            assert usual.wants_window("decode", subject, tokens)
    assert not usual.wants_window("decode", "block", 2)
    assert not usual.wants_window("decode", "pkm", 64)
    assert not usual.wants_window("optimizer", "block", 8192)
    assert Settings(all_windows=True).wants_window("decode", "pkm", 2)
    assert not Settings(all_windows=True, nvml=False).wants_window("decode", "block", 64)


def test_quick_is_less_and_can_be_changed() -> None:
    quick = Settings.quick(presets=("227M-1.2B",), repeats=5)
    assert quick.presets == ("227M-1.2B",)
    assert quick.repeats == 5
    assert len(quick.decode_tokens) < len(Settings().decode_tokens)
    assert quick.wants_window("decode", "block", 64)
