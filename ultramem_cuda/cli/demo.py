"""``ultramem demo``: the whole way from the build to a trained memory layer, and a report of it."""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from pathlib import Path

import torch

from .. import _library
from ..examples.lm.arguments import describe_corpus, resolve_device, results_table
from ..examples.lm.data import load_corpus
from ..examples.lm.errors import UsageError
from ..examples.lm.files import write_atomically
from . import check, diagnosis, doctor, report
from .demo_training import demo_preset, resolve_jobs, threads_per_job, train_kinds
from .report import ReportData

REPORT_NAME = "report.html"


def run(args: argparse.Namespace) -> int:
    """Runs everything; 0 if the library loads and the check passes, else 1."""
    started = time.perf_counter()
    device = resolve_device(args.device)
    preset = demo_preset(device, args.seed, args.steps)
    jobs = resolve_jobs(args.jobs, device)
    now = diagnosis.observe()
    print(doctor.text(now), flush=True)
    if not _library.is_loaded():
        print("ultramem demo: the native library is not loaded; see above", file=sys.stderr)
        return 1
    out: Path = args.out
    _make_directory(out)
    corpus = load_corpus(args.data, args.pattern)

    _heading("Operators and gradients against the float64 reference")
    comparisons = check.compare(check.devices(args.device))
    failed = [row for row in comparisons if not row.ok]
    print(check.render(failed) if failed else check.summary(comparisons), flush=True)

    _heading("Training")
    print(describe_corpus(corpus), flush=True)
    trained = train_kinds(preset, corpus, out / "runs", device, quiet=args.quiet, jobs=jobs)
    results = [one.result for one in trained]
    print(results_table(results))
    print(report.verdict(results), flush=True)

    _heading("Memory traffic, bytes a token in one layer, forward, by tokens in the batch")
    counted = [one.traffic for one in trained if one.traffic is not None]
    print(report.traffic_text(counted))

    data = ReportData(
        created=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        device=_description(device, jobs),
        facts=doctor.sections(now),
        comparisons=comparisons,
        corpus=corpus,
        results=results,
        counted=counted,
        seconds=time.perf_counter() - started,
    )
    path = out / REPORT_NAME
    page = report.render(data).encode()
    try:
        write_atomically(path, lambda file: file.write(page))
    except OSError as error:
        raise UsageError("--out", f"cannot write '{path}': {error.strerror}") from error
    print(f"\nreport: {path.resolve()}  ({data.seconds:.0f} s)")
    return 1 if failed else 0


def _heading(text: str) -> None:
    print(f"\n{text}", flush=True)


def _description(device: torch.device, jobs: int) -> str:
    if device.type == "cuda":
        return doctor.gpu_name(device.index or 0)
    threads = threads_per_job(jobs)
    return (
        f"{doctor.processor_name()}, {jobs} kind{'' if jobs == 1 else 's'} at a time on "
        f"{threads} thread{'' if threads == 1 else 's'} each"
    )


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError("--out", f"cannot create '{path}': {error.strerror}") from error
