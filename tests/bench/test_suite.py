"""The command that runs all benches: what it chooses, runs, writes and leaves out."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ultramem_cuda import cli
from ultramem_cuda.bench import command, report, retrieval_cases, suite
from ultramem_cuda.bench import ops as bench_ops
from ultramem_cuda.bench.record import Record, load
from ultramem_cuda.profiling import timing

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("quick_collections")


def of(us: float) -> timing.Timing:
    return timing.Timing(us / 1e3, us / 1e3, us / 1e3, repeats=2)


def chosen(*arguments: str) -> dict[str, list[str]]:
    return {bench.name: names for bench, names in suite.plan(suite.parse(arguments, "bench"))}


@pytest.fixture(autouse=True)
def _caches_stay_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test looks at how long anything takes."""
    monkeypatch.setitem(timing._FLUSH_BYTES, "cpu", 1)
    monkeypatch.setattr(retrieval_cases, "FLUSHES", 1)


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# ---- what is run ---------------------------------------------------------------------------------


def test_everything_by_default() -> None:
    assert chosen() == {name: list(bench.sections) for name, bench in suite.BENCHES.items()}


def test_parts_that_are_asked_for() -> None:
    assert list(chosen("--only", "value_ffn")) == ["value_ffn"]
    assert chosen("--section", "table", "sweep") == {
        "retrieval": ["table", "sweep"],
        "value_ffn": ["table"],
    }
    # Of L there is a section of its own; sections with shapes of their own stay.
    assert chosen("--shape", "L") == {
        "retrieval": ["table", "memory", "sweep", "adversarial"],
        "value_ffn": ["large"],
        "graph_step": ["layer_step", "lm_step"],
    }
    assert chosen("--only", "value_ffn", "--section", "step", "--shape", "B") == {}


def test_quick_leaves_out_what_is_not_asked_for() -> None:
    quick = suite.parse(["--quick"], "bench")
    assert quick.repeats == suite.QUICK_REPEATS
    assert "large" not in chosen("--quick")["value_ffn"]
    assert chosen("--quick", "--section", "large") == {"value_ffn": ["large"]}
    assert suite.parse(["--quick", "--repeats", "9"], "bench").repeats == 9
    assert suite.parse([], "bench").repeats is None


@pytest.mark.parametrize(
    ("arguments", "compiles"),
    [
        ([], True),
        (["--no-compile"], False),
        (["--quick"], False),
        (["--quick", "--compile"], True),
        (["--smoke", "--compile"], False),
    ],
)
def test_each_bench_gets_its_settings(arguments: list[str], compiles: bool) -> None:
    found: list[retrieval_cases.Settings] = []

    def look(settings: retrieval_cases.Settings, *_: Any) -> Iterator[report.Row]:
        found.append(settings)
        return iter([])

    plan = [
        (
            dataclasses.replace(
                bench, sections={"look": command.Section("looks", look, shapes="S")}
            ),
            ["look"],
        )
        for bench in suite.BENCHES.values()
    ]
    record = Record({}, "bfloat16", True, [])
    parsed = suite.parse([*arguments, "--seed", "7"], "bench")
    assert len(list(suite.measure_gpu(plan, parsed, CPU, record))) == 3
    assert [settings.compile for settings in found] == [compiles, False, False]
    assert [settings.seed for settings in found] == [7, 7, 7]
    expected = [25, 20, 20]
    if "--smoke" in arguments:
        expected = [2, 2, 2]
    elif "--quick" in arguments:
        expected = [suite.QUICK_REPEATS] * 3
    assert [settings.repeats for settings in found] == expected


@pytest.mark.parametrize(
    "arguments",
    [["--only", "ops"], ["--section", "all"], ["--shape", "cpu"], ["--repeats", "1"], ["x"]],
)
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        suite.main(arguments)
    assert ended.value.code == 2


# ---- on a GPU ------------------------------------------------------------------------------------


def two_rows(settings: Any, shape: Any, wrong: list[str]) -> Iterator[report.Row]:
    yield report.Row(shape.name, "fwd", {"ours": of(80.0), "eager": of(800.0)}, ("eager",), 70.0)
    yield report.Row(shape.name, "bwd", {"ours": of(90.0)})


def one_quantity(settings: Any, shape: Any, wrong: list[str]) -> Iterator[report.Quantity]:
    yield report.Quantity(shape.name, "bytes", 2.0, "B")


def breaks(settings: Any, shape: Any, wrong: list[str]) -> Iterator[report.Row]:
    yield report.Row(shape.name, "fwd", {"ours": of(60.0)})
    raise ValueError("no such thing")


def is_too_large(settings: Any, shape: Any, wrong: list[str]) -> Iterator[report.Row]:
    wrong.append("but wrong before")
    raise torch.OutOfMemoryError
    yield


def a_bench(name: str, **measures: command.Measure) -> command.Bench:
    sections = {
        section: command.Section(section, measure, shapes="SM")
        for section, measure in measures.items()
    }
    return command.Bench(name, "for a test", sections, 20, "", notes={f"{name}_floor": "low"})


@pytest.fixture
def _a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which nothing runs, and benches that measure nothing."""
    benches = [
        a_bench("retrieval", table=two_rows, query=breaks),
        a_bench("value_ffn", table=is_too_large, state=one_quantity),
    ]
    monkeypatch.setattr(suite, "BENCHES", {bench.name: bench for bench in benches})
    monkeypatch.setattr(bench_ops, "unavailable", lambda device: None)
    monkeypatch.setattr(suite, "machine", lambda device: {"device": "cuda", "gpu": "a GPU"})


@pytest.mark.usefixtures("_a_gpu")
def test_one_record_and_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {name: tmp_path / "out" / f"bench.{name}" for name in ("json", "markdown", "csv")}
    options = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    assert suite.main(["--shape", "S", "M", *options]) == 1

    record = load(paths["json"])
    assert record.machine == {"device": "cuda", "gpu": "a GPU"}
    assert (record.dtype, record.cold) == ("bfloat16", True)
    assert [shape["name"] for shape in record.shapes] == ["S", "M"]
    assert record.notes == {"retrieval_floor": "low", "value_ffn_floor": "low"}
    assert record.settings["shape"] == ["S", "M"]
    table = ("fwd/ours", "fwd/eager", "bwd/ours")
    keys = [f"retrieval/table/{shape}/{row}" for shape in "SM" for row in table]
    keys += [f"retrieval/query/{shape}/fwd/ours" for shape in "SM"]
    keys += [f"value_ffn/state/{shape}/bytes/ours" for shape in "SM"]
    assert [entry.key for entry in record.entries] == keys
    assert record.wrong == [
        "retrieval: query, S: no such thing",
        "retrieval: query, M: no such thing",
        "value_ffn: but wrong before",
        "value_ffn: but wrong before",
    ]
    assert record.out_of_memory == ["value_ffn: table, S", "value_ffn: table, M"]

    output = capsys.readouterr()
    # One line a row: two rows, one and one at two shapes each.
    assert sum(line.startswith(("retrieval", "value_ffn")) for line in output.out.splitlines()) == 8
    assert "gpu: a GPU" in output.out
    assert "bfloat16, cold caches" in output.out
    assert "  retrieval table S fwd 80 [80, 80] us <= 70 missed eager 10.00x\n" in output.err
    assert "wrong: retrieval: query, S: no such thing" in output.err
    assert "out of memory: value_ffn: table, S" in output.err
    assert len(paths["markdown"].read_text().splitlines()) == 2 + 8
    assert len(paths["csv"].read_text().splitlines()) == 1 + len(keys)


@pytest.mark.usefixtures("_a_gpu")
def test_the_record_is_written_after_each_section(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "bench.json"

    def interrupted(*_: Any) -> Iterator[report.Row]:
        raise KeyboardInterrupt
        yield

    bench = a_bench("retrieval", table=two_rows, query=interrupted)
    monkeypatch.setattr(suite, "BENCHES", {"retrieval": bench})
    with pytest.raises(KeyboardInterrupt):
        suite.main(["--shape", "S", "--json", str(path)])
    assert len(load(path).entries) == 3


@pytest.mark.usefixtures("_a_gpu")
def test_a_good_run_exits_with_0(tmp_path: Path) -> None:
    arguments = ["--only", "value_ffn", "--section", "state", "--smoke"]
    path = tmp_path / "bench.json"
    assert suite.main([*arguments, "--json", str(path)]) == 0
    record = load(path)
    assert [shape["name"] for shape in record.shapes] == ["smoke"]
    assert [entry.key for entry in record.entries] == ["value_ffn/state/smoke/bytes/ours"]


@pytest.mark.usefixtures("_a_gpu")
def test_nothing_to_run_and_nowhere_to_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.json"
    assert suite.main(["--shape", "L", "--json", str(path)]) == 2
    assert "no section" in capsys.readouterr().err
    assert not path.exists()
    (tmp_path / "file").touch()
    assert suite.main(["--json", str(tmp_path / "file" / "bench.json")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_real_sections_fill_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, tiny, with loops for graphs: only what asks torch.cuda for memory fails."""

    def capture(calls: Sequence[Callable[[], object]]) -> SimpleNamespace:
        return SimpleNamespace(replay=lambda: [call() for call in calls])

    def peak(*_: Any) -> Iterator[report.Quantity]:
        raise RuntimeError("no CUDA memory")
        yield

    monkeypatch.setattr(retrieval_cases, "capture", capture)
    memory = dataclasses.replace(suite.BENCHES["retrieval"].sections["memory"], measure=peak)
    sections = {**suite.BENCHES["retrieval"].sections, "memory": memory}
    bench = dataclasses.replace(suite.BENCHES["retrieval"], sections=sections)
    monkeypatch.setitem(suite.BENCHES, "retrieval", bench)
    names = ["--section", "table", "decode", "memory", "layer", "state"]
    arguments = suite.parse(["--smoke", *names], "bench")
    plan = suite.plan(arguments)
    record = Record({}, "bfloat16", True, [])
    count = sum(len(names) for _, names in plan)
    assert len(list(suite.measure_gpu(plan, arguments, CPU, record))) == count
    assert record.wrong == ["retrieval: memory, smoke: no CUDA memory"]
    found = {(entry.bench, entry.section) for entry in record.entries}
    expected = {(bench.name, name) for bench, names in plan for name in names}
    assert found == expected - {("retrieval", "memory")}
    keys = [entry.key for entry in record.entries]
    assert len(keys) == len(set(keys))
    assert all(entry.value is not None for entry in record.entries)


@pytest.mark.gpu
def test_smoke_run_on_the_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    assert suite.main(["--smoke", "--json", str(path)]) == 0
    assert torch.cuda.get_device_name() in capsys.readouterr().out
    record = load(path)
    assert record.wrong == record.out_of_memory == []
    found = {(entry.bench, entry.section) for entry in record.entries}
    assert found == {(b.name, name) for b in suite.BENCHES.values() for name in b.sections}


# ---- without a GPU -------------------------------------------------------------------------------


def test_smoke_run_on_the_cpu(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    command = [sys.executable, "-m", "bench", "--device", "cpu", "--smoke", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = load(path)
    assert (record.dtype, record.cold, record.wrong) == ("float32", False, [])
    assert [shape["name"] for shape in record.shapes] == ["smoke"]
    rows = {(entry.bench, entry.section) for entry in record.entries}
    assert rows == {("ops", operator) for operator in bench_ops.OPERATORS}
    assert sum(entry.peer == "ours" for entry in record.entries) == 10
    assert "The GPU benches were left out: " in done.stdout
    assert record.notes["left_out"].startswith("The GPU benches were left out: ")
    assert sum(line.startswith("ops ") for line in done.stdout.splitlines()) == 10
    assert "ops value_ffn smoke fwd, uniform" in done.stderr


@pytest.mark.usefixtures("_no_gpu")
def test_a_machine_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.json"
    options = ["--smoke", "--json", str(path)]
    assert suite.main(["--device", "cuda", *options]) == 1
    assert "torch sees no CUDA device" in capsys.readouterr().err
    assert suite.main(["--section", "table", *options]) == 2
    assert "need a GPU (torch sees no CUDA device)" in capsys.readouterr().err
    assert not path.exists()

    asked: list[str] = []

    def run(arguments: Any) -> tuple[list[bench_ops.Row], list[str]]:
        (operator,) = arguments.op
        asked.append(operator)
        if operator == "tucker_query":
            raise ValueError("no such thing")
        timings = {"ours": of(1.0), "eager": of(2.0)}
        return [bench_ops.Row("smoke", operator, "fwd", "", timings, None)], ["it differs"]

    monkeypatch.setattr(bench_ops, "run", run)
    assert suite.main(["--only", "retrieval", *options]) == 1
    assert asked == ["tucker_query", "product_key_topk"]
    record = load(path)
    assert record.wrong == ["ops: tucker_query: no such thing", "ops: it differs"]
    assert [entry.key for entry in record.entries] == [
        "ops/product_key_topk/smoke/fwd/ours",
        "ops/product_key_topk/smoke/fwd/eager",
    ]
    assert record.notes["left_out"].endswith("torch sees no CUDA device.")


def test_options_reach_the_operators() -> None:
    options = ["--repeats", "7", "--warmup", "2", "--seed", "3", "--shape", "S", "--compile"]
    found = suite.cpu_arguments(suite.parse(options, "bench"), "value_ffn")
    assert (found.device, found.op, found.repeats, found.warmup) == ("cpu", ["value_ffn"], 7, 2)
    assert (found.seed, found.compile, found.smoke) == (3, True, False)
    assert [shape.name for shape in found.shapes] == ["S"]
    plain = suite.cpu_arguments(suite.parse([], "bench"), "value_ffn")
    assert (plain.repeats, plain.compile) == (30, False)
    assert [shape.name for shape in plain.shapes] == ["cpu"]


# ---- ultramem bench ------------------------------------------------------------------------------


def test_the_command_forwards_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[list[str], str]] = []

    def main(argv: list[str], prog: str) -> int:
        found.append((argv, prog))
        return 1

    monkeypatch.setattr(suite, "main", main)
    arguments = ["--quick", "--only", "retrieval", "--version", "--json", "x.json", "-h"]
    assert cli.main(["bench", *arguments]) == 1
    assert found == [(arguments, "ultramem bench")]
    assert cli.main(["bench"]) == 1
    assert found[1:] == [([], "ultramem bench")]


def test_no_other_command_loads_the_benches() -> None:
    code = (
        "import sys; from ultramem_cuda import cli; cli.build_parser(); "
        "print(json.dumps([name for name in sys.modules if '.bench' in name]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == []
