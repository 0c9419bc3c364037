"""Nsight Compute: its command line, its CSV in both formats, and what its refusals come to."""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
import stat
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from ultramem_cuda.profiling.nsight import ncu, nsys, targets
from ultramem_cuda.profiling.nsight.ncu_csv import (
    METRICS,
    KernelBytes,
    NcuError,
    agreement,
    base_name,
    parse,
    table,
    total,
)
from ultramem_cuda.profiling.record import Bytes

OUTPUT = Path(__file__).parent / "nsight_output"
"""Of ncu 2025.3.1 on an H100: three passes of the targets copy and gather, one of moe, at 8192
tokens; most columns of the device and of the launch are left out."""

NEG = (
    "void vectorized_elementwise_kernel<4, neg_kernel_cuda(TensorIteratorBase &)::[lambda() "
    "(instance 2)]::operator ()() lambda() (instance 3)]::operator ()() lambda(int) (instance 1)], "
    "array<char *, 2>>(int, T2, T3)"
)
NEG_NAME = "vectorized_elementwise_kernel"
VALUE = "void unnamed>::value_ffn_fwd_kernel<__nv_bfloat16, 32, 4>(ValueFfnParams, SlotArguments)"
VALUE_NAME = "value_ffn_fwd_kernel"
RANGES = "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"
STARTED = "Id:Domain:Start/Stop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"
IDENTITY = ("ID", "Process ID", "Process Name", "Host Name", RANGES, STARTED, "Kernel Name")
PLACE = ("Context", "Stream", "Block Size", "Grid Size", "Device", "CC")
# ncu prints metrics by name, among others that belong to the launch.
WIDE_METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum")

Launch = tuple[str, str, str, str]
"""Kernel, bytes read, bytes written, time."""

LAUNCHES: list[Launch] = [
    (NEG, "1,073,766,400", "1,072,200,960", "713,696"),
    (VALUE, "2,431,205,632", "14,680,064", "951,264"),
    (NEG, "1,073,811,968", "1,072,834,304.00", "711,232"),
]
BANNER = (
    "==WARNING== Note: Running with uncontrolled GPU caches. Profiling results may be "
    "inconsistent.\n"
    "==PROF== Connected to process 812 (python3.12)\n"
)
FAREWELL = "==PROF== Disconnected from process 812\n"


def written(rows: Sequence[Sequence[str]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def identity(number: int, kernel: str) -> list[str]:
    ranges = '812 "<default domain>:copy:none:none:none:none:none:none" '
    return [str(number), "812", "python3.12", "127.0.0.1", ranges, "", kernel]


PLACED = ["1", "7", "(128, 1, 1)", "(524288, 1, 1)", "0", "9.0"]


def wide(launches: Sequence[Launch], units: Sequence[str] = ("byte", "byte", "ns")) -> str:
    """As --page raw --csv prints it: a row of units below the header."""
    rows = [[*IDENTITY, *PLACE, "launch__registers_per_thread", *WIDE_METRICS]]
    rows.append([""] * (len(IDENTITY) + len(PLACE)) + ["register/thread", *units])
    for number, (kernel, *values) in enumerate(launches):
        rows.append([*identity(number, kernel), *PLACED, "32", *values])
    return BANNER + written(rows) + FAREWELL


def long(launches: Sequence[Launch], units: Sequence[str] = ("byte", "byte", "nsecond")) -> str:
    """As --csv prints it without a page: a row a metric."""
    rows = [[*IDENTITY, *PLACE, "Section Name", "Metric Name", "Metric Unit", "Metric Value"]]
    for number, (kernel, *values) in enumerate(launches):
        metrics = [
            ("Command line profiler metrics", *m) for m in zip(METRICS, units, values, strict=True)
        ]
        metrics.append(("Launch Statistics", "Registers Per Thread", "register/thread", "32"))
        rows += [[*identity(number, kernel), *PLACED, *metric] for metric in metrics]
    return BANNER + written(rows) + FAREWELL


EXPECTED = [
    KernelBytes(NEG_NAME, 2, 2147578368.0, 2145035264.0, 1424928.0),
    KernelBytes(VALUE_NAME, 1, 2431205632.0, 14680064.0, 951264.0),
]


# ---- parsing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("copy", KernelBytes(NEG_NAME, 3, 3221336576.0, 3217963264.0, 2136192.0)),
        ("gather", KernelBytes("vectorized_gather_kernel", 3, 4857148928.0, 4829049856.0, 3328640)),
    ],
)
def test_parse_output(target: str, expected: KernelBytes) -> None:
    assert parse((OUTPUT / f"{target}.csv").read_text()) == [expected]


def test_parse_output_of_many_kernels() -> None:
    """Triton's, CUTLASS's, CUB's and torch's own; two grouped products of one name."""
    kernels = parse((OUTPUT / "moe.csv").read_text())
    triton = [k.kernel for k in kernels if k.kernel.startswith("triton_")]
    assert len(triton) == len(set(triton)) == 8
    launches = {k.kernel: k.launches for k in kernels if k.kernel not in triton}
    assert launches == {
        "cutlass::device_kernel<gemm::GemmUniversal>": 2,
        "cuda::prepare_grouped_gemm_data": 2,
        "nvjet_sm90_tst_64x64_64x13_1x2_h_bz_TNT": 1,
        "native::_scatter_gather_elementwise_kernel": 1,
        "native::fill_reverse_indices_kernel": 1,
        "at_cuda_detail::DeviceRadixSortHistogramKernel": 1,
        "at_cuda_detail::DeviceRadixSortExclusiveSumKernel": 1,
        "at_cuda_detail::DeviceRadixSortOnesweepKernel": 1,
    }
    everything = total(kernels)
    assert everything.launches == 18
    assert (everything.read, everything.write) == (2137275392, 980370176)


@pytest.mark.parametrize("layout", [wide, long])
def test_parse(layout) -> None:
    assert parse(layout(LAUNCHES)) == EXPECTED


@pytest.mark.parametrize("layout", [wide, long])
def test_parse_scaled_units(layout) -> None:
    found = parse(layout([(NEG, "1.50", "2", "3.25")], ("Gbyte", "Mbyte", "us")))
    assert found == [KernelBytes(NEG_NAME, 1, 1.5e9, 2e6, 3250.0)]


@pytest.mark.parametrize("layout", [wide, long])
def test_parse_other_processes_and_their_output(layout) -> None:
    """Launches are numbered anew in each process, which may print a header of its own."""
    first = layout(LAUNCHES[:1])
    second = layout(LAUNCHES[:1]).replace('"812"', '"813"')
    if layout is wide:  # the units are printed once
        lines = second.splitlines(keepends=True)
        second = "".join(line for line in lines if "register/thread" not in line)
    (kernel,) = parse("tokens, seconds\n12\n" + first + "done, 3\n" + second)
    assert (kernel.launches, kernel.read) == (2, 2 * 1073766400.0)


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        (NEG, NEG_NAME),
        (VALUE, VALUE_NAME),
        (
            "native::<unnamed>::fill_reverse_indices_kernel(long *, int)",
            "native::fill_reverse_indices_kernel",
        ),
        ("void (anonymous namespace)::gather<int>(int *)", "gather"),
        ("void a::<unnamed>::k<a::<unnamed>::Traits, 4>(a::<unnamed>::Params)", "a::k"),
        ("void k<unnamed>::Traits, 4>(Params)", "k"),
        ("triton_poi_fused_arange_6", "triton_poi_fused_arange_6"),
        ("spread(float *, const float *)", "spread"),
        # Values with casts, as older versions print them; comparisons; operators.
        ("void cub::detail::Onesweep<A<(bool)0>, B<(int)4>>(T *, T)", "cub::detail::Onesweep"),
        ("void f<(A > B), (C < D), (int)1>(int)", "f"),
        ("void f<(1 << 3), (8 >> 1)>(int)", "f"),
        ("void f<&S::operator->, &S::operator<, 1>(int)", "f"),
        ("void S<int>::operator ()<float>(int)", "S::operator()"),
        ("void a::S<int, 4>::run<8>(int)", "a::S::run"),
        ("void at::k<4, at::f(X &)::{lambda()#1}::operator()() const>(int)", "at::k"),
        ("f(int)::[lambda() (instance 1)]::operator ()(int) const", "f::lambda::operator()"),
        # What a template only wraps is the name.
        (
            "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_align8>(T1::Params)",
            "cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_align8>",
        ),
        (
            "void at_cuda_detail::core::_kernel_agent<at_cuda_detail::Agent<int, (bool)1>, F>(F)",
            "at_cuda_detail::core::_kernel_agent<at_cuda_detail::Agent>",
        ),
        (
            "void at_cuda_detail::detail::Kernel<P::Policy1000, 0>(T1 *)",
            "at_cuda_detail::detail::Kernel<P::Policy1000>",
        ),
        ("void a::Kernel<int>::run(int)", "a::Kernel::run"),
        # Cut off.
        ("void at::native::k<4, at::f(", "at::native::k"),
        ("(", "("),
        ("", ""),
    ],
)
def test_base_name(kernel: str, name: str) -> None:
    assert base_name(kernel) == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no CSV"),
        (BANNER + FAREWELL, "no CSV"),
        (wide([]), "no kernel"),
        (long([]), "no kernel"),
        (wide([(NEG, "n/a", "1", "1")]), "'n/a', not a number"),
        (long([(NEG, "1", "", "1")]), "'', not a number"),
        (wide([(NEG, "1", "1", "1")], ("sector", "byte", "ns")), "unit 'sector'"),
        (wide(LAUNCHES).replace("dram__bytes_write", "dram__cycles"), r"no dram__bytes_write\.sum"),
        (long(LAUNCHES).replace("gpu__time_duration", "sm__cycles"), r"no gpu__time_duration\.sum"),
        (re.sub(r'(?m)^"",.*\n', "", wide(LAUNCHES)), "row of units is missing"),
        (wide(LAUNCHES).replace(',"711,232"', ""), "cut short"),
    ],
)
def test_parse_refuses(text: str, message: str) -> None:
    with pytest.raises(NcuError, match=message):
        parse(text)


# ---- beside the model ----------------------------------------------------------------------------


def test_total_and_share_of_a_pass() -> None:
    everything = total(EXPECTED)
    assert everything == KernelBytes("all kernels", 3, 4578784000.0, 2159715328.0, 2376192.0)
    assert everything.of_one(3).read == everything.read / 3
    assert everything.of_one(3).launches == 1


def test_agreement() -> None:
    model = Bytes(dense=1e9, gathered=3e9, distinct=2e9, activations=0.0)
    found = agreement("both", EXPECTED, passes=2, model=model, nvml=3.5e9)
    assert (found.what, found.model, found.nvml) == ("both", 4e9, 3.5e9)
    assert found.ncu_read == 4578784000.0 / 2
    assert found.ncu_write == 2159715328.0 / 2
    assert found.ncu == 6738499328.0 / 2


def test_table() -> None:
    model = Bytes(dense=0.0, gathered=6e9, distinct=3e9, activations=0.0)
    lines = table(EXPECTED, passes=1, model=model, nvml=7e9).splitlines()
    cells = {line[: lines[0].index("launches")].strip(): line.split() for line in lines}
    assert cells[NEG_NAME][-6:] == ["2", "2147.6", "2145.0", "4292.6", "1424.9", "3.01"]
    assert cells["all kernels"][-6:] == ["3", "4578.8", "2159.7", "6738.5", "2376.2", "2.84"]
    assert cells["model"][1] == "6000.0"
    assert cells["model"][-1] == "1.123"
    assert cells["model, each row once"][-1] == "2.246"
    assert cells["NVML"][-1] == "0.963"


def test_table_cuts_long_names_in_the_middle() -> None:
    kernels = parse((OUTPUT / "moe.csv").read_text())
    (swiglu,) = (k for k in kernels if "_silu_" in k.kernel)
    assert len(swiglu.kernel) > 100
    lines = table(kernels, passes=1).splitlines()
    (line,) = (line for line in lines if " 269.5 " in line)
    name = line.split()[0]
    assert len(name) == 60
    head, tail = name.split("...")
    assert swiglu.kernel.startswith(head)
    assert swiglu.kernel.endswith(tail)
    assert min(len(head), len(tail)) >= 28
    assert len({len(line) for line in lines}) == 1


# ---- the command line ----------------------------------------------------------------------------


def test_command() -> None:
    line = ncu.command(["prog", "x"], log_file=Path("f.csv"), nvtx_range="ultramem::value_ffn bwd")
    assert line[0] == "ncu"
    assert line[-4:] == ["--log-file", "f.csv", "prog", "x"]
    pairs = dict(itertools.pairwise(line))
    assert pairs["--metrics"] == ",".join(METRICS)
    assert pairs["--nvtx-include"] == "ultramem::value_ffn bwd/"
    assert pairs["--profile-from-start"] == "off"
    assert pairs["--clock-control"] == pairs["--cache-control"] == "none"
    assert pairs["--page"] == "raw"
    assert "--csv" in line
    assert "--section" not in line


def test_command_with_the_section_file() -> None:
    line = ncu.command(
        ["prog"],
        log_file=Path("f.txt"),
        from_start=True,
        cache_control="all",
        metrics=(),
        sections=[ncu.SECTION],
        page="details",
    )
    pairs = dict(itertools.pairwise(line))
    files = list(Path(pairs["--section-folder"]).glob("*.section"))
    assert pairs["--section"] == ncu.SECTION
    assert [f'Identifier: "{ncu.SECTION}"' in file.read_text() for file in files] == [True]
    assert pairs["--profile-from-start"] == "on"
    assert pairs["--cache-control"] == "all"
    assert "--metrics" not in line
    assert "--csv" not in line


@pytest.mark.parametrize("name", ["", "a/b", "a,b", "x@y", "[a", "a*"])
def test_command_refuses_patterns(name: str) -> None:
    with pytest.raises(ValueError, match="nvtx_range"):
        ncu.command(["prog"], log_file=Path("f"), nvtx_range=name)


def test_command_refuses_nothing_to_collect() -> None:
    with pytest.raises(ValueError, match="metrics or sections"):
        ncu.command(["prog"], log_file=Path("f"), metrics=())


def test_section_file_is_well_formed() -> None:
    """Text of protocol buffers: braces that close, and each metric with a label and a name."""
    text = (ncu.SECTION_FOLDER / "ultramem.section").read_text()
    assert text.count("{") == text.count("}")
    blocks = re.findall(r"Metrics \{\s*Label: \"([^\"]+)\"\s*Name: \"([^\"]+)\"\s*\}", text)
    assert len(blocks) == text.count("Metrics {")
    names = [name for _, name in blocks]
    assert len(set(names)) == len(names)
    assert set(METRICS) <= set(names)


def test_nsys_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert nsys.main(["value_ffn", "--tokens", "16", "--output", "out/x"]) == 0
    profile, stats = capsys.readouterr().out.splitlines()
    assert profile.startswith("nsys profile --trace=cuda,nvtx ")
    assert " --capture-range=cudaProfilerApi " in profile
    assert " --cuda-graph-trace=node " in profile
    assert " --output=out/x " in profile
    assert profile.endswith("targets value_ffn --shape M --tokens 16 --passes 3")
    assert stats.startswith("nsys stats ")
    assert stats.endswith("--report nvtx_kern_sum out/x.nsys-rep")
    whole = nsys.profile_command(["prog"], Path("x"), from_start=True)
    assert not any(argument.startswith("--capture-range") for argument in whole)


# ---- running it ----------------------------------------------------------------------------------


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty PATH, and no toolkit elsewhere."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "other"))
    return folder


def install(
    executable: Path, *, log: str = "", out: str = "", status: int = 0, seconds: float = 0.0
) -> Path:
    """Something in ncu's place that writes what it is told to its log file and its output."""
    executable.parent.mkdir(parents=True, exist_ok=True)
    executable.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, sys, time\n"
        f"time.sleep({seconds})\n"
        "name = sys.argv[sys.argv.index('--log-file') + 1]\n"
        f"pathlib.Path(name).write_text({log!r})\n"
        f"print({out!r})\n"
        f"sys.exit({status})\n"
    )
    executable.chmod(executable.stat().st_mode | stat.S_IXUSR)
    return executable


def test_find(path: Path, tmp_path: Path) -> None:
    in_toolkit = install(tmp_path / "toolkit" / "bin" / "ncu")
    assert ncu.find() == in_toolkit
    on_path = install(path / "ncu")
    assert ncu.find() == on_path


def test_newest_version_is_the_greatest_number() -> None:
    versions = [Path(f"/opt/nvidia/nsight-compute/{v}/ncu") for v in ("2025.3.1", "2025.10.0")]
    assert max(versions, key=ncu._version) == versions[1]


def test_run_and_read_again(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(path / "ncu", log=wide(LAUNCHES), out="value_ffn: rows")
    file = tmp_path / "new" / "f.csv"
    assert ncu.kernels_of("value_ffn", log_file=file, passes=1) == EXPECTED
    sizes = ["--target", "value_ffn", "--shape", "S", "--tokens", "64", "--passes", "1"]
    assert ncu.main([str(file), *sizes, "--run"]) == 0
    printed = capsys.readouterr().out
    assert ncu.main([str(file), *sizes]) == 0
    assert capsys.readouterr().out == printed
    model = targets.MODELS["value_ffn"](targets.SHAPES["S"], 64)
    assert f"{model.upper / 1e6:.1f}" in printed
    assert VALUE_NAME in printed


def test_print_command_is_what_runs(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ncu.main(["f.csv", "--target", "copy", "--print-command"]) == 0
    line = capsys.readouterr().out.split()
    assert line[0] == "ncu"
    assert line[-7:] == ["copy", "--shape", "M", "--tokens", "8192", "--passes", "3"]
    assert not (tmp_path / "f.csv").exists()


PERMISSION = (
    "==PROF== Connected to process 5 (python)\n"
    "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU "
    "Performance Counters on the target device 0.\n"
)


@pytest.mark.parametrize(
    ("log", "out", "status", "message"),
    [
        (PERMISSION, "", 1, "may not read the GPU's counters"),
        (PERMISSION, "", 0, "may not read the GPU's counters"),
        ("", "==ERROR== unrecognised option '--print-unitz'.", 1, "option of the command line"),
        ("==WARNING== No kernels were profiled.\n", "", 0, "no kernel was profiled"),
        (
            "==ERROR== The application returned an error code (1).\n"
            "==WARNING== No kernels were profiled.\n",
            "targets: no CUDA GPU that torch can use",
            1,
            "program failed: targets: no CUDA GPU that torch can use",
        ),
        ("", "Failed to initialize the profiler: LibraryNotLoaded", 1, "profiling interface"),
        (
            "==ERROR== Profiling failed because a driver resource was unavailable.\n",
            "",
            1,
            "another program holds",
        ),
        (
            "==ERROR== Cuda driver is not compatible with Nsight Compute.\n",
            "",
            1,
            "newer Nsight Compute",
        ),
        ("==ERROR== Failed to find metric dram__x.sum\n", "", 1, "does not offer a metric"),
        ("", "out of luck", 3, "exit status 3: out of luck"),
        ("", "", 3, "exit status 3: no output"),
        ("==PROF== Disconnected\n", "", 0, "no CSV"),
    ],
)
def test_refusals_are_sentences(
    path: Path, tmp_path: Path, log: str, out: str, status: int, message: str
) -> None:
    install(path / "ncu", log=log, out=out, status=status)
    with pytest.raises(NcuError, match=message):
        ncu.kernels_of("copy", log_file=tmp_path / "f.csv")


def test_words_of_the_program_are_no_refusal(path: Path, tmp_path: Path) -> None:
    install(path / "ncu", log=wide(LAUNCHES), out="note: ERR_NVGPUCTRPERM is explained in the docs")
    assert ncu.kernels_of("copy", log_file=tmp_path / "f.csv") == EXPECTED


def test_not_installed(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ncu, "find", lambda: None)
    assert ncu.main([str(tmp_path / "f.csv"), "--target", "copy", "--run"]) == 1
    assert "Nsight Compute is not installed" in capsys.readouterr().err


def test_does_not_start(tmp_path: Path) -> None:
    missing = tmp_path / "ncu"
    with pytest.raises(NcuError, match=r"does not start: No such file"):
        ncu.run([str(missing)], tmp_path / "f.csv")


def test_program_ends_with_ncu(path: Path, tmp_path: Path) -> None:
    """Past its time, both are killed: what ncu has started, too."""
    executable = path / "ncu"
    pid_file = tmp_path / "pid"
    executable.write_text(
        f"#!{sys.executable}\n"
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pid_file)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    executable.chmod(0o755)
    with pytest.raises(NcuError, match="not finished after 5 s"):
        ncu.run([str(executable)], tmp_path / "f.csv", timeout_s=5.0)
    stat_file = Path(f"/proc/{int(pid_file.read_text())}/stat")
    for _ in range(100):
        # Gone, or dead and not yet reaped by whoever inherits it.
        if not stat_file.exists() or stat_file.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the program still runs")


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["f.csv", "--run"], ["f.csv", "--passes", "0"], ["f.csv", "--target", "no"]):
        with pytest.raises(SystemExit):
            ncu.main(arguments)
    assert ncu.main([os.devnull]) == 1
    assert "no CSV" in capsys.readouterr().err
