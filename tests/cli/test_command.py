"""The command line: what it prints and how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ultramem_cuda import _library, cli, ops
from ultramem_cuda.cli import check, diagnosis, doctor

TINY = [
    *("--preset", "tiny", "--steps", "2", "--batch", "2", "--context", "32"),
    *("--val-windows", "2", "--device", "cpu", "--quiet"),
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(60):
        (folder / f"file{number}.py").write_text(f"# file {number}\n" + "value = 1\n" * 20)
    return folder


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_module_runs_and_helps() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "ultramem_cuda", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for command in ("doctor", "check", "train", "pack", "demo", "bench", "profile"):
        assert command in result.stdout


@pytest.mark.parametrize(
    "command", ["doctor", "check", "train", "pack", "demo", "bench", "profile"]
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(command, "--help")
    assert ended.value.code == 0
    assert f"usage: ultramem {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["train", "--kind", "nonsense"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor") == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert _library.cpu_capability() in printed
    assert str(_library.library_path()) in printed
    for section in ("Built", "This machine", "Will be used"):
        assert section in printed


def test_doctor_without_the_library(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_library, "_load_error", "the native library is missing; build it")
    assert run("doctor") == 1
    printed = capsys.readouterr().out
    assert "NO: the native library is missing; build it" in printed
    assert "none: the native library is not loaded" in printed


def test_a_source_tree_that_is_not_built_says_what_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It hides an installed package, which `pip install .` again would not change."""
    monkeypatch.setattr(_library, "_PATH", tmp_path / "ultramem_cuda" / "libultramem_torch.so")
    assert "`pip install` ultramem_cuda again" in str(_library._load())
    (tmp_path / "setup.py").touch()
    assert f"this is the source tree at {tmp_path}" in str(_library._load())


@pytest.mark.parametrize("arguments", [["check"], ["train"], ["demo"]])
def test_commands_that_need_the_library_say_so(
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(_library, "_load_error", "the native library is missing; build it")
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) in (1, 2)
    captured = capsys.readouterr()
    assert "the native library is missing; build it" in captured.out + captured.err


def test_check_passes_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "FAILED" not in printed
    for operator in set(ops.__all__) - {"value_slots"}:  # whose result has no dtype to check
        for dtype in ("fp64", "fp32", "bf16", "fp16"):
            if operator != "tucker_filter" or dtype in ("fp64", "fp32"):
                assert any(
                    line.split()[1].startswith(operator) and f" {dtype} " in line
                    for line in printed.splitlines()[1:-1]
                ), (operator, dtype)


@pytest.mark.gpu
def test_check_passes_on_the_gpu() -> None:
    assert run("check", "--device", "cuda") == 0


def check_only(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32; the whole check has its own test."""
    monkeypatch.setattr(check, "_OPERATORS", {case: check._OPERATORS[case]})
    monkeypatch.setattr(check, "CPU_DTYPES", (torch.float32,))


@pytest.mark.parametrize(
    ("case", "spoil"),
    [
        ("rms_norm", lambda y: y * 1.001),
        ("value_ffn", lambda y: torch.cat([y[:-1], 2 * y[-1:]])),
        ("value_ffn", lambda y: y * float("nan")),
        ("product_key_topk, query per rank", lambda pair: (pair[0], pair[1].flip(-1))),
    ],
)
def test_check_fails_on_a_wrong_operator(
    case: str,
    spoil,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check_only(case, monkeypatch)
    assert run("check", "--device", "cpu") == 0
    assert "FAILED" not in capsys.readouterr().out
    operator = case.split(",")[0]
    right = getattr(ops, operator)
    monkeypatch.setattr(ops, operator, lambda *args, **kwargs: spoil(right(*args, **kwargs)))
    assert run("check", "--device", "cpu") == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.endswith("FAILED")]
    assert any(operator in line for line in failed)


def test_check_notices_a_missing_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.value_ffn

    def cut(indices, scores, *rest, **options):  # type: ignore[no-untyped-def]
        return right(indices, scores.detach(), *rest, **options)

    check_only("value_ffn", monkeypatch)
    monkeypatch.setattr(ops, "value_ffn", cut)
    rows = check.compare([torch.device("cpu")])
    wrong = {(row.operator, row.quantity) for row in rows if not row.ok}
    assert ("value_ffn", "grad scores") in wrong
    assert all(quantity == "grad scores" for _, quantity in wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "missing"], "argument --data: cannot read 'missing'"),
        (["--resume"], "argument --resume: there is no checkpoint"),
        (["--device", "nonsense"], "argument --device: 'nonsense' is not a device"),
        (["--device", "cuda:99"], "argument --device: 'cuda:99': this machine has"),
        (["--steps", "0"], "argument --steps: must be positive, got 0"),
        (["--lr", "-1"], "argument --lr: must be positive, got -1.0"),
        (["--weight-decay", "-1"], "argument --weight-decay: must be >= 0"),
        (["--precision", "fp8"], "argument --precision: must be one of fp32, bf16, got 'fp8'"),
        (["--attention-heads", "7"], "attention_heads"),
        (["--topk", "5000"], "topk"),
        (["--context", "100000000"], "training bytes are too few"),
        (["--val-fraction", "1.5"], "argument --val-fraction: must be below 1"),
    ],
)
def test_wrong_arguments_of_train(
    arguments: list[str],
    message: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("train", *TINY, "--data", source, "--out", "runs", *arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("ultramem train: error: argument ")
    assert message in lines[0]


@pytest.mark.parametrize("command", ["check", "demo"])
@pytest.mark.parametrize("seed", ["-1", str(2**63), str(2**64), "1.5", "x"])
def test_seeds_that_are_refused(
    command: str, seed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(command, "--seed", seed)
    assert ended.value.code == 2
    message = f"argument --seed: must be a whole number from 0 to {2**63 - 1}, got '{seed}'"
    assert message in capsys.readouterr().err


def test_the_largest_seed_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "CPU_DTYPES", (torch.float32,))
    monkeypatch.setattr(check, "_OPERATORS", {"rms_norm": check._OPERATORS["rms_norm"]})
    assert run("check", "--device", "cpu", "--seed", 2**63 - 1) == 0
    torch.manual_seed(2**63 - 1)


def test_train_pack_resume(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "text.npz"
    assert run("pack", archive, "--data", source) == 0
    packed = capsys.readouterr().out
    digest = packed.split("sha256 ")[1].split()[0]

    train = ["train", *TINY, "--kind", "dense", "ultramem_v2", "--data", archive, "--out", tmp_path]
    assert run(*train) == 0
    printed = capsys.readouterr().out
    assert digest in printed
    assert "ultramem_v2" in printed.splitlines()[-1]
    for kind in ("dense", "ultramem_v2"):
        records = (tmp_path / f"{kind}-seed0" / "log.jsonl").read_text().splitlines()
        assert json.loads(records[0])["data_sha256"] == digest
        assert (tmp_path / f"{kind}-seed0" / "checkpoint.pt").exists()

    assert run(*train) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert run(*train, "--resume") == 0
    assert run(*train, "--overwrite") == 0
    (tmp_path / "dense-seed0" / "checkpoint.pt").write_bytes(b"broken")
    assert run(*train, "--resume") == 2
    assert "is damaged or not one" in capsys.readouterr().err
    assert run(*train, "--resume", "--steps", "3") == 2


def test_pack_refuses_other_names(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("pack", tmp_path / "text.zip", "--data", source) == 2
    assert "argument archive: must end in .npz" in capsys.readouterr().err
    assert run("pack", tmp_path / "no" / "text.npz", "--data", source) == 2
    assert "argument archive: cannot write" in capsys.readouterr().err


def test_the_package_runs_as_a_module(source: Path, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "ultramem_cuda"]
    archive = tmp_path / "text.npz"
    done = subprocess.run(
        [*program, "pack", archive, "--data", source], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    failed = subprocess.run(
        [*program, "train", "--data", tmp_path / "none"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert failed.returncode == 2
    assert "error: argument --data: cannot read" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_usable_cores_and_memory_are_plausible() -> None:
    facts = dict(doctor.sections(diagnosis.observe())["This machine"])
    assert doctor.usable_cores() >= 1
    assert "usable cores" in facts["processor"]
    assert facts["memory"].endswith("GiB")
