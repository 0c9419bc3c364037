"""``ultramem profile``: memory layers against mixtures of experts, counted and measured.

    profile = harness.profile(Settings(), say=print)

All points are there from the beginning, by the byte model; what is measured replaces them one
number of tokens after the other. What cannot be had (no GPU, no NVML, no permission, no memory)
becomes a sentence in the record, never an exception.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from . import agreement, instruments, timing
from .agreement import Counted
from .contenders import groups, package_case
from .draft import Draft
from .instruments import Instruments, free_memory, measure_ceilings
from .measuring import PACKAGE_TOKENS, GroupProfiler
from .moe_packages import PackagedMoE, installed_moe_packages
from .nvml import Unavailable
from .presets import Case, ProfilePreset
from .record import Phase, Profile
from .settings import Settings, SettingsError

__all__ = ["Progress", "Settings", "SettingsError", "measure_presets", "profile"]

Say = Callable[[str], object]

# Rough seconds on an H100, for a first estimate of the time.
_BUILD_SECONDS = 4.0
_COMPILE_SECONDS = {"decode": 3.0, "training": 6.0}
_TIMING_SECONDS = 1.0
# Beside a window itself.
_WINDOW_SECONDS = 1.0
_NCU_SECONDS = 25.0


def profile(
    settings: Settings,
    say: Say = lambda line: None,
    *,
    save: Callable[[Profile], object] = lambda profile: None,
    command: str = "",
) -> Profile:
    """Counts and, on a GPU, measures what the settings name.

    Args:
        say: told what is being done, a line each.
        save: given the profile after every number of tokens, so that a run that is broken off
            leaves what it had found.
        command: the command line that repeats it, for the record.
    """
    reason = instruments.unavailable() if settings.measure else "it was not asked for"
    draft = Draft(timing.machine(torch.device("cpu")), save, command)
    if reason is not None:
        for preset in settings.chosen_presets():
            draft.add(preset, _Grid(settings))
        draft.note(f"This is the byte model alone, nothing was measured: {reason}")
        return draft.profile()
    with instruments.open_instruments(
        use_nvml=settings.nvml,
        window_seconds=settings.window_seconds,
        compiled=settings.compiled,
        note=draft.note,
    ) as opened:
        draft.machine = timing.machine(opened.device)
        _set_ceilings(draft, opened.device)
        progress = Progress(say)
        progress.plan(_comparison_seconds(opened, settings))
        measure_presets(draft, settings.chosen_presets(), opened, settings, progress)
        compare_counts(draft, opened, settings, progress)
    return draft.profile()


def _set_ceilings(draft: Draft, device: torch.device) -> None:
    try:
        found = measure_ceilings(device)
    except torch.OutOfMemoryError:
        found = Unavailable("large matrices do not fit in the GPU's memory")
    if isinstance(found, Unavailable):
        draft.note(f"The ceilings are those of an H100, not measured: {found.reason}")
    else:
        draft.ceilings = found
    free_memory(device)


@dataclass(frozen=True)
class _Grid:
    """Numbers of tokens of a subject, by phase."""

    settings: Settings
    decode_alone: Sequence[str] = ()
    """Subjects that are measured at few points."""

    def __call__(self, case: Case) -> dict[Phase, Sequence[int]]:
        decode, training = self.settings.decode_tokens, self.settings.training_tokens
        if case.name in self.decode_alone:
            return {"decode": [tokens for tokens in decode if tokens in PACKAGE_TOKENS]}
        return {"decode": decode, "training": training, "optimizer": training}


def measure_presets(
    draft: Draft,
    presets: Sequence[ProfilePreset],
    instruments: Instruments,
    settings: Settings,
    progress: Progress,
) -> None:
    """Adds the presets to the draft and measures their subjects, group by group."""
    draft.note("The optimizer's step is counted by the model alone.")
    packages = _packages(draft, settings)
    planned = []
    for preset in presets:
        extended, decode_alone = _with_packages(preset, packages)
        draft.add(extended, _Grid(settings, decode_alone))
        planned += [_Planned(preset, cases, packages) for cases in groups(preset)]
    draft.save()
    steps = [step for group in planned for step in _steps(group, instruments, settings)]
    progress.plan(sum(step.seconds for step in steps))
    for group in planned:
        _measure_group(draft, group, instruments, settings, progress)


def _packages(draft: Draft, settings: Settings) -> list[PackagedMoE]:
    if not settings.packages:
        return []
    found, notes = installed_moe_packages()
    for note in notes:
        draft.note(note)
    return found


def _with_packages(
    preset: ProfilePreset, packages: Sequence[PackagedMoE]
) -> tuple[ProfilePreset, list[str]]:
    """The preset with the packages' MoE as further subjects, and the names of these."""
    names = {case.name for case in preset.cases}
    if "moe" not in names:
        return preset, []
    added = [package_case(package, preset["moe"]) for package in packages]
    compared = [("block", case.name) for case in added] if "block" in names else []
    extended = replace(
        preset,
        cases=(*preset.cases, *added),
        comparisons=(*preset.comparisons, *compared),
    )
    return extended, [case.name for case in added]


@dataclass(frozen=True)
class _Planned:
    """Subjects that are measured in turns."""

    preset: ProfilePreset
    cases: Sequence[Case]
    packages: Sequence[PackagedMoE]

    def __str__(self) -> str:
        return f"{self.preset.name}: {', '.join(case.name for case in self.cases)}"


@dataclass(frozen=True)
class _Step:
    """A number of tokens, or (0) the building of the layers, with an estimate of its time."""

    phase: Phase
    tokens: int
    seconds: float


def _steps(group: _Planned, instruments: Instruments, settings: Settings) -> Iterator[_Step]:
    names = [case.name for case in group.cases]
    compiling = [case for case in group.cases if case.kind in ("ffn", "block", "moe")]
    grids: dict[Phase, Sequence[int]] = {
        "decode": settings.decode_tokens,
        "training": settings.training_tokens,
    }
    for phase, grid in grids.items():
        if grid:
            yield _Step(phase, 0, _BUILD_SECONDS)
        for tokens in sorted(grid):
            seconds = _TIMING_SECONDS * len(names)
            if instruments.compiled:
                seconds += _COMPILE_SECONDS[phase] * len(compiling)
            if instruments.windows is not None:
                watched = sum(settings.wants_window(phase, name, tokens) for name in names)
                seconds += (settings.window_seconds + _WINDOW_SECONDS) * watched
            yield _Step(phase, tokens, seconds)


def _measure_group(
    draft: Draft,
    group: _Planned,
    instruments: Instruments,
    settings: Settings,
    progress: Progress,
) -> None:
    profiler = None
    for step in _steps(group, instruments, settings):
        if step.tokens == 0:
            progress.say(f"{group}: {step.phase}")
            if profiler is None:
                profiler = GroupProfiler(
                    draft, group.preset, group.cases, instruments, settings, group.packages
                )
            profiler.start(step.phase)
        else:
            progress.say(f"  {step.phase}, {step.tokens:,} tokens")
            assert profiler is not None
            profiler.measure(step.phase, step.tokens)
            draft.save()
        progress.done(step.seconds)
    if profiler is not None:
        progress.say(f"  first calls, with torch.compile: {profiler.first_call_seconds:.0f} s")
    del profiler
    free_memory(instruments.device, collect=True)


class Progress:
    """Says what is being done, and how long the rest will take by what the beginning took."""

    def __init__(self, say: Say) -> None:
        self._planned = self._done = 0.0
        self._started = time.perf_counter()
        self._say = say

    def plan(self, seconds: float) -> None:
        """More is to be done."""
        self._planned += seconds

    def say(self, text: str) -> None:
        elapsed = time.perf_counter() - self._started
        pace = elapsed / self._done if self._done else 1.0
        left = (self._planned - self._done) * pace
        self._say(f"[{elapsed:4.0f} s, about {left:.0f} s left] {text}")

    def done(self, seconds: float) -> None:
        """So much of what was planned."""
        self._done += seconds


def _comparison_seconds(opened: Instruments, settings: Settings) -> float:
    watched = settings.window_seconds + _WINDOW_SECONDS if opened.windows else 0.0
    each = _BUILD_SECONDS + watched + (_NCU_SECONDS if settings.ncu else 0.0)
    return each * len(settings.agreement_targets)


def compare_counts(
    draft: Draft, opened: Instruments, settings: Settings, progress: Progress
) -> None:
    """Bytes of simple targets by the model, by NVML and by ncu."""
    if not settings.ncu:
        draft.note("ncu was not run, as requested")
        if opened.windows is None:
            return
    counted: list[Counted] = []
    for name in settings.agreement_targets:
        progress.say(f"bytes of {name} by the model{' and NVML' if opened.windows else ''}")
        try:
            counted.append(agreement.by_nvml(name, opened.windows, opened.device))
        except torch.OutOfMemoryError:
            draft.note(f"{name}: bytes were not compared: it does not fit in the GPU's memory")
    draft.agreement = [agreement.explained(one) for one in counted]
    draft.save()
    if not settings.ncu:
        return
    progress.say(f"bytes of {', '.join(one.row.what for one in counted)} by ncu, if it may")
    for index, one in enumerate(agreement.by_ncu(counted, draft.note)):
        draft.agreement[index] = agreement.explained(one)
        draft.save()
