"""The order in which several processes (pytest-xdist) take the files of tests."""

from __future__ import annotations

from xdist.scheduler import LoadFileScheduling

# Its tests share process groups, whose start takes longer than most of them.
TOGETHER = "tests/parallel"
# Files of fewer tests hold the long ones, which start processes or compile.
FEW_TESTS = 60


class FileSchedule(LoadFileScheduling):
    """A file to a process, a folder that shares more than that as one; what takes long comes
    first, so that all processes end at about the same time."""

    def _split_scope(self, nodeid: str) -> str:
        return TOGETHER if nodeid.startswith(f"{TOGETHER}/") else super()._split_scope(nodeid)

    def _assign_work_unit(self, node: object) -> None:
        self.workqueue.move_to_end(min(self.workqueue, key=self._rank), last=False)
        super()._assign_work_unit(node)  # type: ignore[arg-type]

    def _rank(self, scope: str) -> tuple[bool, bool, int]:
        count = len(self.workqueue[scope])
        many = count > FEW_TESTS
        return scope != TOGETHER, many, -count if many else count
