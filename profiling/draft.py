"""A profile while it is made: the byte model first, then what is measured, saved as it goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .presets import Case, ProfilePreset
from .record import Agreement, Ceilings, Phase, Point, Profile
from .traffic import Recipe

__all__ = ["RECIPE", "Draft", "Key"]

Key = tuple[str, str, Phase, int]
"""Preset, subject, phase, tokens."""

# Training passes here add to gradients that are there.
RECIPE = Recipe(accumulate=True)
_UNFINISHED = "The run was not finished: what is missing without a reason was not reached."


def model_point(preset: str, case: Case, phase: Phase, tokens: int) -> Point:
    """What the byte model says."""
    return Point(
        preset=preset,
        subject=case.name,
        phase=phase,
        tokens=tokens,
        flops=case.layer.flops(phase, tokens, recipe=RECIPE),
        model=case.layer.traffic(phase, tokens, recipe=RECIPE),
    )


class Draft:
    """All points from the beginning, each replaced once more is known.

    Args:
        machine: as the record has it.
        save: called with the profile so far, by :meth:`save`.
        command: that repeats it.
    """

    def __init__(
        self,
        machine: Mapping[str, Any],
        save: Callable[[Profile], object],
        command: str = "",
    ) -> None:
        self.machine = dict(machine)
        self.ceilings = H100
        self.agreement: list[Agreement] = []
        self._save = save
        self._command = command
        self._presets: list[ProfilePreset] = []
        self._points: dict[Key, Point] = {}
        self._notes: dict[str, None] = {}  # A set that keeps its order.

    def add(
        self, preset: ProfilePreset, grid: Callable[[Case], Mapping[Phase, Sequence[int]]]
    ) -> None:
        """A preset's points, by the model.

        Args:
            grid: numbers of tokens of a subject, by phase.
        """
        self._presets.append(preset)
        for case in preset.cases:
            for phase, numbers in grid(case).items():
                for tokens in sorted(numbers):
                    point = model_point(preset.name, case, phase, tokens)
                    self._points[preset.name, case.name, phase, tokens] = point

    def __getitem__(self, key: Key) -> Point:
        return self._points[key]

    def update(self, key: Key, **changes: Any) -> None:
        """Sets fields of a point; notes are appended to those that are there."""
        point = self._points[key]
        if "note" in changes:
            changes["note"] = " ".join(filter(None, (point.note, changes["note"])))
        self._points[key] = dataclasses.replace(point, **changes)

    def note(self, sentence: str) -> None:
        """Once, however often it is said; ends in a full stop."""
        self._notes[sentence if sentence.endswith(".") else f"{sentence}."] = None

    def save(self) -> None:
        """Hands over what is there, marked as unfinished."""
        self._save(self.profile(finished=False))

    def profile(self, *, finished: bool = True) -> Profile:
        return Profile(
            machine=self.machine,
            ceilings=self.ceilings,
            presets=[preset.record() for preset in self._presets],
            points=list(self._points.values()),
            agreement=list(self.agreement),
            notes=[*([] if finished else [_UNFINISHED]), *self._notes],
            command=self._command,
        )


H100 = Ceilings(copy_bytes_per_second=3.0e12, matmul_flops_per_second=786e12, measured=False)
"""What one reached, of its 3.35 TB/s and 989 TFLOP/s (bfloat16); for a model without a GPU."""
