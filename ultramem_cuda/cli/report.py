"""The demo's report: one HTML file that needs no network and no script."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..examples.lm.config import KINDS, ModelConfig
from ..examples.lm.data import Corpus
from ..examples.lm.train import RunResult
from ..profiling import traffic
from ..profiling.presets import profile_preset
from ..reporting.numbers import bytes_text, count_text
from ..reporting.page import STYLE, document, escape, status, swatch, table
from ..reporting.svg import Axis, Marker, Series, line_chart
from .check import Comparison, summary
from .doctor import Sections

COLOURS = """
:root { --dense: #5c6670; --moe: #c2570c; --pkm: #7a4fc4; --ultramem_v2: #0a72b8; }
@media (prefers-color-scheme: dark) { :root {
  --dense: #a3adb7; --moe: #f0883e; --pkm: #b392f0; --ultramem_v2: #58b0f0; } }
"""


_USERS: dict[str, tuple[str, ...]] = {
    "ffn_inner": ("dense", "pkm", "ultramem_v2"),
    "num_experts": ("moe",),
    "experts_per_token": ("moe",),
    "expert_inner": ("moe",),
    "balance_loss": ("moe",),
    "num_keys": ("pkm", "ultramem_v2"),
    "key_dim": ("pkm", "ultramem_v2"),
    "memory_heads": ("pkm", "ultramem_v2"),
    "topk": ("pkm", "ultramem_v2"),
    "value_dim": ("pkm", "ultramem_v2"),
    "memory_init": ("pkm", "ultramem_v2"),
    "pre_value_dim": ("ultramem_v2",),
}


@dataclass(frozen=True)
class CountedTraffic:
    """What one sparse layer of a trained model touches, by batch size.

    Shares are of its experts or rows; bytes are those of the whole feed-forward part, a token.
    "expected" is the formula for uniform choices, "counted" what held-out text really used.
    """

    kind: str
    batches: Sequence[int]
    expected_share: Sequence[float]
    counted_share: Sequence[float]
    expected_bytes: Sequence[float]
    counted_bytes: Sequence[float]


@dataclass(frozen=True)
class ReportData:
    """Everything the report shows. ``seconds`` is the whole demo's wall time."""

    created: str
    device: str
    facts: Sections
    comparisons: Sequence[Comparison]
    corpus: Corpus
    results: Sequence[RunResult]
    counted: Sequence[CountedTraffic]
    seconds: float


def verdict(results: Sequence[RunResult]) -> str:
    """UltraMemV2 against dense, then the others, as it came out."""
    loss = {result.model_config.kind: result.final_loss for result in results}
    tokens = results[0].validation.tokens[-1]
    memory, dense = loss["ultramem_v2"], loss["dense"]
    relation = "lower than" if memory < dense else "not lower than"
    return (
        f"After {tokens:,} bytes of text, ultramem_v2 reaches a validation loss of {memory:.4f} "
        f"nats a byte, {relation} dense's {dense:.4f} (difference {memory - dense:+.4f}), at equal "
        f"active parameters.{_others(loss)}"
    )


def _others(loss: Mapping[str, float]) -> str:
    rest = [f"{kind} {value:.4f}" for kind, value in loss.items() if kind in ("moe", "pkm")]
    return f" For comparison: {', '.join(rest)}." if rest else ""


def traffic_text(counted: Sequence[CountedTraffic]) -> str:
    """The traffic tables for a terminal."""
    lines = ["OLMoE-1B-7B block and UltraMemV2 in its place (formula, bf16)"]
    lines += _text_table(_block_header(), _block_rows())
    crossing = _block_crossover()
    lines.append(f"UltraMemV2 reads less up to {_last_batch(crossing)} tokens in a batch.")
    if counted:
        lines.append("The layers trained above (held-out text, bf16)")
        lines += _text_table(_counted_header(counted), _counted_rows(counted))
    return "\n".join(lines)


def render(data: ReportData) -> str:
    """The whole page."""
    body = "\n".join(
        [
            "<h1>ultramem demo</h1>",
            f'<p class="quiet">{escape(data.created)} · {escape(data.device)} · '
            f"{data.seconds:.0f} s</p>",
            f'<p class="verdict">{escape(verdict(data.results))}</p>',
            _training(data),
            _traffic(data),
            _check(data.comparisons),
            _machine(data.facts),
            _settings(data),
        ]
    )
    return document("ultramem demo", STYLE + COLOURS, body, _payload(data))


def _training(data: ReportData) -> str:
    results = data.results
    # The first evaluation, before any training, would flatten all the others.
    series = [
        Series(
            result.model_config.kind,
            result.validation.tokens[1:],
            result.validation.loss[1:],
            result.model_config.kind,
        )
        for result in results
    ]
    chart = line_chart(
        series,
        Axis("training bytes", format=count_text),
        Axis("validation loss, nats a byte", format="{:.3g}".format),
        title="Validation loss against training bytes for each kind of block",
    )
    rows = []
    for result in results:
        tokens = result.validation.tokens[-1]
        rows.append(
            [
                swatch(result.model_config.kind, result.model_config.kind),
                f"{result.counts.active:,}",
                f"{result.counts.total:,}",
                f"{result.final_loss:.4f}",
                f"{tokens / result.seconds / 1000:,.1f}",
                f"{result.seconds:,.0f}",
            ]
        )
    header = ["kind", "active parameters", "total", "nats a byte", "kB/s", "seconds"]
    curve_rows = [
        [count_text(tokens), *(f"{result.validation.loss[i]:.4f}" for result in results)]
        for i, tokens in enumerate(results[0].validation.tokens)
    ]
    kinds = [result.model_config.kind for result in results]
    return f"""<h2>Training: four kinds of blocks, one text</h2>
<p>Byte-level decoders trained on {len(data.corpus.data):,} bytes of source text, evaluated on files
that were held out. All have the active parameters of the dense one (what a byte makes use of); the
three sparse ones have equal totals, too. Same data, order, seed and network learning rate.</p>
<div class="scroll">{chart}</div>
{table(header, rows)}
<p class="quiet">One seed and a very short run: a direction, not a study. At the size for CPUs,
losses of one kind move by some 0.03 from seed to seed. Speed is that of this machine and this
version.</p>
<details><summary>Validation losses as numbers</summary>
{table(["training bytes", *kinds], curve_rows)}</details>"""


def _traffic(data: ReportData) -> str:
    crossing = _block_crossover()
    batches = traffic.BATCH_SIZES
    moe, memory = _block_traffic()
    bytes_axis = Axis("bytes a token", log=True, format=bytes_text)
    batch_axis = Axis("tokens in the batch", log=True, format=count_text)
    formula = line_chart(
        [
            Series("MoE", batches, [row.lower for row in moe], "moe"),
            Series("UltraMemV2", batches, [row.upper for row in memory], "ultramem_v2"),
            Series(
                "distinct rows",
                batches,
                [row.lower for row in memory],
                "ultramem_v2",
                dashed=True,
                markers=False,
            ),
        ],
        batch_axis,
        bytes_axis,
        title="Bytes a token by batch size: OLMoE block against UltraMemV2",
        markers=[] if crossing is None else [Marker(crossing, f"crossover {crossing:,}")],
    )
    parts = [
        f"""<h2>Memory traffic by batch size</h2>
<p>Parameters that one feed-forward layer must read in a forward pass over a batch of independent
tokens, as in decoding: an OLMoE-1B-7B block (64 experts, 8 a token) and what UltraMemV2 has in its
place (a dense FFN beside a memory layer). A formula for uniform routing in bf16, without
activations. UltraMemV2 reads less up to {_last_batch(crossing)} tokens; beyond, all experts are in
use anyway and each serves many tokens, while rows are still gathered token by token.</p>
<div class="scroll">{formula}</div>
<p class="quiet">Solid: every gathered row counted. Dashed: rows that occur twice in a batch counted
once, as a perfect cache would have it.</p>
{table(_block_header(), _block_rows())}"""
    ]
    if data.counted:
        series = []
        for row in data.counted:
            share = [100 * part for part in row.expected_share]
            counted = [100 * part for part in row.counted_share]
            series.append(Series(row.kind, row.batches, share, row.kind, markers=False))
            series.append(Series("", row.batches, counted, row.kind, markers_only=True))
        chart = line_chart(
            series,
            batch_axis,
            Axis("experts or rows touched, %", format="{:.3g}".format),
            title="Share of experts or rows touched by batch size in the trained models",
        )
        parts.append(
            f"""<h2>The same, counted in the models trained above</h2>
<p>The share of a layer's experts or table rows that a batch makes use of. Lines: the formula, for
uniform choices. Points: what held-out bytes, drawn at random, really used, averaged over layers.
Below, bytes a token of the whole feed-forward part with distinct rows; in models this small
the parts that every batch reads make up most of it.</p>
<div class="scroll">{chart}</div>
{table(_counted_header(data.counted), _counted_rows(data.counted))}"""
        )
    return "\n".join(parts)


def _check(comparisons: Sequence[Comparison]) -> str:
    groups: dict[tuple[str, str, str], list[Comparison]] = {}
    for row in comparisons:
        groups.setdefault((row.device, row.operator, row.dtype), []).append(row)
    worst = []
    for (device, operator, dtype), members in groups.items():
        row = max(members, key=lambda member: _used_share(member))
        worst.append(
            [
                device,
                operator,
                dtype,
                row.quantity,
                f"{row.error:.1e}",
                f"{row.bound:.1e}",
                status(all(member.ok for member in members)),
            ]
        )
    header = ["device", "operator", "dtype", "closest to its bound", "error", "bound", ""]
    rows = [
        [row.device, row.operator, row.dtype, row.quantity, f"{row.error:.1e}", f"{row.bound:.1e}"]
        for row in comparisons
    ]
    every = table(["device", "operator", "dtype", "quantity", "error", "bound"], rows)
    return f"""<h2>Operators and gradients</h2>
<p>{escape(summary(comparisons))}: relative L2 errors against the NumPy float64 reference, which is
given the same rounded inputs, and the number of tokens whose kept slots differ by more than
rounding explains (bound 0).</p>
<div class="scroll">{table(header, worst)}</div>
<details><summary>All {len(rows)} comparisons</summary>
<div class="scroll">{every}</div>
</details>"""


def _used_share(row: Comparison) -> float:
    """Part of the bound that is used up; most for a failure."""
    if not row.ok:
        return float("inf")
    return row.error / row.bound if row.bound else 0.0


def _machine(facts: Sections) -> str:
    parts = ["<h2>Build and machine</h2>"]
    for title, rows in facts.items():
        parts.append(table([title, ""], [[label, value] for label, value in rows]))
    return "\n".join(parts)


def _settings(data: ReportData) -> str:
    train = data.results[0].train_config
    names = [field.name for field in dataclasses.fields(ModelConfig) if field.name != "kind"]
    rows = [
        [name, *(_setting(result.model_config, name) for result in data.results)] for name in names
    ]
    header = ["model", *(result.model_config.kind for result in data.results)]
    train_rows = [[name, str(value)] for name, value in dataclasses.asdict(train).items()]
    return f"""<h2>Settings</h2>
<p>Text: {len(data.corpus.paths):,} files from <code>{escape(data.corpus.origin)}</code>, sha256
<code>{data.corpus.sha256}</code>.</p>
<details open><summary>Models</summary><div class="scroll">{table(header, rows)}</div></details>
<details><summary>Training, the same for all</summary>
{table(["training", ""], train_rows)}</details>"""


def _setting(config: ModelConfig, name: str) -> str:
    """A value, or a dash where the kind makes no use of it."""
    return str(getattr(config, name)) if config.kind in _USERS.get(name, KINDS) else "-"


def _blocks() -> tuple[traffic.Layer, traffic.Layer]:
    """An OLMoE-1B-7B block, and what UltraMemV2 has in its place."""
    preset = profile_preset("1B-7B")
    return preset["moe"].layer, preset["block"].layer


def _block_traffic() -> tuple[list[traffic.TrafficRow], ...]:
    """Parameters that the two blocks read, a token."""
    return tuple(traffic.per_token(layer, activations=False) for layer in _blocks())


def _block_crossover() -> int | None:
    moe, memory = _blocks()
    return traffic.crossover(memory, moe, activations=False)


def _block_header() -> list[str]:
    return ["tokens", "MoE", "UltraMemV2", "distinct rows", "UltraMemV2 / MoE"]


def _block_rows() -> list[list[str]]:
    moe, memory = _block_traffic()
    return [
        [
            f"{a.batch:,}",
            f"{a.upper / 1e6:.3f} MB",
            f"{b.upper / 1e6:.3f} MB",
            f"{b.lower / 1e6:.3f} MB",
            f"{b.upper / a.upper:.2f}",
        ]
        for a, b in zip(moe, memory, strict=True)
    ]


def _counted_header(counted: Sequence[CountedTraffic]) -> list[str]:
    return ["tokens", *(f"{row.kind}{kind}" for row in counted for kind in ("", " counted"))]


def _counted_rows(counted: Sequence[CountedTraffic]) -> list[list[str]]:
    return [
        [
            f"{batch:,}",
            *(
                bytes_text(x)
                for row in counted
                for x in (row.expected_bytes[i], row.counted_bytes[i])
            ),
        ]
        for i, batch in enumerate(counted[0].batches)
    ]


def _text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in [header, *rows]
    ]


def _last_batch(crossing: int | None) -> str:
    return "any number of" if crossing is None else f"{crossing - 1:,}"


def _payload(data: ReportData) -> dict[str, object]:
    """What the report shows, for programs."""
    return {
        "created": data.created,
        "device": data.device,
        "seconds": data.seconds,
        "facts": {title: dict(rows) for title, rows in data.facts.items()},
        # NaN and Inf are no JSON.
        "comparisons": [
            {**dataclasses.asdict(row), "error": row.error if math.isfinite(row.error) else None}
            for row in data.comparisons
        ],
        "corpus": {
            "origin": data.corpus.origin,
            "files": len(data.corpus.paths),
            "bytes": len(data.corpus.data),
            "sha256": data.corpus.sha256,
        },
        "results": [
            {
                "model": dataclasses.asdict(result.model_config),
                "training": dataclasses.asdict(result.train_config),
                "parameters": dataclasses.asdict(result.counts),
                "train": dataclasses.asdict(result.train),
                "validation": dataclasses.asdict(result.validation),
                "seconds": result.seconds,
            }
            for result in data.results
        ],
        "traffic": [dataclasses.asdict(row) for row in data.counted],
    }
