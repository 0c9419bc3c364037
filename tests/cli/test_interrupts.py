"""Commands that are broken off: by a signal, by a reader that goes away, by a full device."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ultramem_cuda.cli.interrupts import Terminated, terminable

PROGRAM = [sys.executable, "-m", "ultramem_cuda"]
# The check has its own tests; here one operator is enough.
ONE_OPERATOR = """
import sys
from ultramem_cuda import cli
from ultramem_cuda.cli import check
check._OPERATORS = {"rms_norm": check._OPERATORS["rms_norm"]}
sys.exit(cli.main(sys.argv[1:]))
"""
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this machine has no /dev/full")
# Far more than any test waits for: the training never ends by itself.
ENDLESS = ["--steps", "1000000", "--device", "cpu"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(60):
        (folder / f"file{number}.py").write_text(f"# file {number}\n" + "value = 1\n" * 60)
    return folder


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def members(group: int) -> list[int]:
    """Processes of a group that still run. Zombies do not, and not every init reaps them."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue  # It has ended meanwhile.
        if int(pgrp) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


class Demo:
    """A demo in a process group of its own, with two training processes at work."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.errors = folder / "stderr"
        out = folder / "out"
        arguments = ["--data", str(source), "--out", str(out), "--jobs", "2", "--quiet", *ENDLESS]
        with open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", ONE_OPERATOR, "demo", *arguments],
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
                # A shell starts what runs in its background with SIGINT ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        self.group = self.process.pid
        assert wait_until(lambda: len(list(out.glob("runs/*/log.jsonl"))) == 2, 120)
        # The command, two processes that train, and multiprocessing's resource tracker.
        assert len(members(self.group)) >= 3


@pytest.fixture
def demo(tmp_path: Path, source: Path) -> Iterator[Demo]:
    demo = Demo(tmp_path, source)
    yield demo
    for pid in members(demo.group):
        os.kill(pid, signal.SIGKILL)
    demo.process.wait()


@pytest.mark.parametrize(
    ("number", "whole_group", "code", "message"),
    [
        (signal.SIGTERM, False, 143, "ultramem demo: terminated\n"),
        (signal.SIGINT, False, 130, "ultramem demo: interrupted\n"),
        # As a terminal sends it.
        (signal.SIGINT, True, 130, "ultramem demo: interrupted\n"),
        (signal.SIGKILL, False, -signal.SIGKILL, None),
    ],
)
def test_a_demo_that_is_stopped_leaves_no_process(
    demo: Demo, number: int, whole_group: bool, code: int, message: str | None
) -> None:
    if whole_group:
        os.killpg(demo.group, number)
    else:
        os.kill(demo.process.pid, number)
    assert demo.process.wait(timeout=20) == code
    assert wait_until(lambda: not members(demo.group), 10), members(demo.group)
    if message is not None:
        assert demo.errors.read_text() == message


def train(source: Path, out: Path) -> list[str]:
    sizes = ["--preset", "tiny", "--batch", "2", "--context", "32", "--val-windows", "2"]
    places = ["--data", str(source), "--out", str(out)]
    return [*PROGRAM, "train", *sizes, *places, *ENDLESS, "--eval-every", "1"]


def test_training_is_terminated(source: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        train(source, tmp_path / "out"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("text: ")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 143
    assert errors == "ultramem train: terminated\n"


@pytest.mark.parametrize("command", ["doctor", "train"])
def test_a_reader_that_goes_away(command: str, source: Path, tmp_path: Path) -> None:
    arguments = [*PROGRAM, "doctor"] if command == "doctor" else train(source, tmp_path / "out")
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            arguments, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=120
        )
    finally:
        os.close(writer)
    assert done.returncode == 141
    assert done.stderr == ""


@needs_full
@pytest.mark.parametrize("command", ["doctor", "train", "check"])
def test_a_full_device(command: str, source: Path, tmp_path: Path) -> None:
    arguments = train(source, tmp_path / "out") if command == "train" else [*PROGRAM, command]
    if command == "check":
        arguments = [sys.executable, "-c", ONE_OPERATOR, command]
    with open(FULL, "wb") as full:
        done = subprocess.run(
            arguments, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=120
        )
    assert done.returncode == 1
    reason = "cannot write the output: No space left on device"
    assert done.stderr == f"ultramem {command}: error: {reason}\n"


def test_no_output_at_all() -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *PROGRAM, "doctor"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_sigterm_is_an_exception_once_and_inside_only() -> None:
    def body() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            # The second one does not disturb the cleaning up.
            signal.raise_signal(signal.SIGTERM)
            cleaned.append(True)

    cleaned: list[bool] = []
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), terminable():
        body()
    assert cleaned
    assert signal.getsignal(signal.SIGTERM) == before


def test_another_thread_is_left_alone() -> None:
    handlers = []

    def body() -> None:
        with terminable():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]
