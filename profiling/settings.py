"""What a profile is to cover."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .presets import DECODE_TOKENS as PRESET_DECODE_TOKENS
from .presets import NAMES, TRAINING_TOKENS, ProfilePreset, profile_preset
from .record import Phase
from .sampling import MINIMUM_SECONDS

__all__ = ["Settings", "SettingsError"]

AGREEMENT_TARGETS = ("copy", "gather", "value_ffn", "moe")
DECODE_TOKENS = (*PRESET_DECODE_TOKENS, 8192)
# A window of NVML takes seconds where a timing takes milliseconds: by default these alone have one.
WINDOW_SUBJECTS = ("block", "moe", "moe-matched", "memory")
WINDOW_TOKENS: dict[Phase, tuple[int, ...]] = {
    "decode": (1, 4, 16, 64, 256, 1024, 4096, 8192),
    "training": (1024, 8192, 65536),
}


class SettingsError(ValueError):
    """A setting that cannot be; ``name`` is the field's."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name}: {problem}")
        self.name = name
        self.problem = problem


@dataclass(frozen=True)
class Settings:
    """What is counted and measured, and how carefully.

    Raises:
        SettingsError: names the field.
    """

    presets: Sequence[str] = NAMES
    subjects: Sequence[str] = ()
    """Of all the presets together; none: every one."""
    decode_tokens: Sequence[int] = DECODE_TOKENS
    training_tokens: Sequence[int] = TRAINING_TOKENS
    measure: bool = True
    """False: the byte model alone, as where there is no GPU."""
    nvml: bool = True
    ncu: bool = True
    compiled: bool = True
    """Whether the FFN and the mixtures of experts go through torch.compile, where that works."""
    packages: bool = True
    """Whether the MoE of installed packages are measured beside ours."""
    repeats: int = 20
    """Timed runs of each point."""
    window_seconds: float = 1.5
    """Of a window of NVML, without the half second before it."""
    all_windows: bool = False
    """A window for every point; else for the subjects and numbers of tokens above."""
    agreement_targets: Sequence[str] = AGREEMENT_TARGETS
    """Whose bytes are compared by model, NVML and ncu."""
    seed: int = 0
    """Of weights and inputs."""

    @classmethod
    def quick(cls, **changes: Any) -> Settings:
        """Little of everything, in one to two minutes on an H100."""
        few: dict[str, Any] = {
            "presets": ("1B-7B",),
            "subjects": ("block", "moe"),
            "decode_tokens": (1, 64, 4096),
            "training_tokens": (8192,),
            "packages": False,
            "repeats": 10,
            "window_seconds": 1.0,
            "agreement_targets": ("copy",),
        }
        return cls(**{**few, **changes})

    def __post_init__(self) -> None:
        for name in ("presets", "subjects", "decode_tokens", "training_tokens"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise SettingsError(name, f"must be different, got {_listed(values)}")
        self._check_names("presets", self.presets, NAMES)
        if not self.presets:
            raise SettingsError("presets", "must not be empty")
        known = dict.fromkeys(c.name for name in self.presets for c in profile_preset(name).cases)
        self._check_names("subjects", self.subjects, tuple(known))
        self._check_names("agreement_targets", self.agreement_targets, AGREEMENT_TARGETS)
        for name in ("decode_tokens", "training_tokens"):
            for tokens in getattr(self, name):
                if tokens < 1:
                    raise SettingsError(name, f"must be positive, got {tokens}")
        if self.repeats < 2:
            raise SettingsError("repeats", f"must be at least 2, got {self.repeats}")
        if not self.window_seconds >= MINIMUM_SECONDS:
            raise SettingsError(
                "window_seconds", f"must be at least {MINIMUM_SECONDS:g}, got {self.window_seconds}"
            )

    @staticmethod
    def _check_names(field: str, names: Sequence[str], known: Sequence[str]) -> None:
        for name in names:
            if name not in known:
                raise SettingsError(field, f"must be among {_listed(known)}, got {name!r}")

    def chosen_presets(self) -> list[ProfilePreset]:
        """The presets with the chosen subjects; one without any of them is left out."""
        return [
            chosen
            for name in self.presets
            if (chosen := select(profile_preset(name), self.subjects)).cases
        ]

    def wants_window(self, phase: Phase, subject: str, tokens: int) -> bool:
        """Whether NVML is to watch this point."""
        usual = subject in WINDOW_SUBJECTS and tokens in WINDOW_TOKENS.get(phase, ())
        return self.nvml and (self.all_windows or usual)


def select(preset: ProfilePreset, subjects: Sequence[str]) -> ProfilePreset:
    """A preset with some of its subjects, and the comparisons that are left; with no names, all."""
    if not subjects:
        return preset
    return dataclasses.replace(
        preset,
        cases=tuple(case for case in preset.cases if case.name in subjects),
        comparisons=tuple(pair for pair in preset.comparisons if set(pair) <= set(subjects)),
    )


def _listed(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)
