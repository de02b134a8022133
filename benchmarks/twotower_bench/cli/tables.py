"""Tables of measured cells for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from twotower_bench.measurement_file import MeasurementFile
from twotower_bench.records import BASELINE, EXPECTED_WITHOUT_DRAFTS, ServingCell
from twotower_bench.summary import CellSummary
from twotower_spec.machine import commit, describe_machine


def speed_table(figures: Sequence[CellSummary]) -> Table:
    """Tokens per second and latency, a section per load."""
    table = _table("tok/s", "speed-up", "verdict", "TTFT ms", "ITL ms", "differ")
    for row in _with_sections(table, figures):
        latency = row.latency
        table.add_row(
            row.system.title,
            f"{row.tokens_per_s.value:.0f}",
            "" if row.speed_up is None or row.system.name == BASELINE else f"{row.speed_up:.2f}x",
            "" if row.verdict == "-" else row.verdict,
            f"{1e3 * latency.first_token:.0f} / {1e3 * latency.first_token_p99:.0f}",
            f"{1e3 * latency.gap:.0f} / {1e3 * latency.gap_p99:.0f}",
            "" if row.num_different is None else str(row.num_different),
        )
    table.caption = "TTFT, ITL: median / 99th percentile. differ: prompts with another text than without speculation."
    return table


def acceptance_table(figures: Sequence[CellSummary]) -> Table:
    """What became of drafts and where a round's time goes, a section per load; systems without drafts left out."""
    table = _table("accept. length", "tok / step", "tok / NFE", "extend", "denoise", "host", "verify")
    drafted = [row for row in figures if row.acceptance.acceptance_length]
    for row in _with_sections(table, drafted):
        found, times = row.acceptance, row.round_times
        phases = (times.extend, times.denoise, times.host, times.verify) if times else ()
        table.add_row(
            row.system.title,
            str(found.acceptance_length),
            f"{found.tokens_per_step.value:.2f}",
            f"{row.tokens_per_nfe:.2f}" if row.tokens_per_nfe else "",
            *(f"{1e3 * seconds:.1f}" for seconds in phases),
        )
    table.caption = "Acceptance length: with 95 % interval over prompts. extend to verify: ms per round of the batch."
    return table


def position_table(figures: Sequence[CellSummary]) -> Table:
    """Conditional acceptance by position, a section per load."""
    most = max((len(row.acceptance.by_position) for row in figures), default=0)
    table = _table(*(str(i + 1) for i in range(min(most, 8))))
    for row in _with_sections(table, [row for row in figures if row.acceptance.by_position]):
        table.add_row(row.system.title, *(f"{share:.2f}" for share in row.acceptance.conditional_by_position[:8]))
    table.caption = "Accepted at each position, of the drafts that were reached; the first 8."
    return table


def print_remarks(console: Console, num_prompts: int, cells: Sequence[ServingCell]) -> None:
    """Prompts that were left out, and requests that went without drafts for a reason that should not be."""
    left_out = num_prompts - len({request.prompt_id for cell in cells for request in cell.requests})
    if left_out:
        console.print(f"{left_out} of {num_prompts} prompts were too long and are left out.")
    for cell in cells:
        reasons = cell.drafting.without_drafts if cell.drafting else {}
        odd = ", ".join(
            f"{reason} {count}" for reason, count in reasons.items() if reason not in EXPECTED_WITHOUT_DRAFTS
        )
        if odd:
            where = f"{cell.system.title}, {cell.load}, repeat {cell.repeat + 1}"
            console.print(f"{where}: requests without drafts: {odd}", markup=False, soft_wrap=True)


def print_origin(console: Console, record: MeasurementFile[Any]) -> None:
    """What was measured with, and how."""
    vllm = next((f"vllm {v}" for n, v in record.where["versions"].items() if n.startswith("vllm") and v), "vllm ?")
    console.print(f"{describe_machine()}, {vllm}, commit {commit() or 'unknown'}", markup=False, soft_wrap=True)
    console.print(record.where["command"], markup=False, soft_wrap=True)


def _table(*headings: str) -> Table:
    table = Table("system", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in headings:
        # Rather two lines than a heading cut off.
        table.add_column(heading, justify="right", overflow="fold")
    return table


def _with_sections(table: Table, figures: Sequence[CellSummary]) -> Iterator[CellSummary]:
    """The same rows; a section with the load as its heading before the first of each."""
    load = None
    for row in figures:
        if row.load != load:
            load = row.load
            table.add_section()
            table.add_row(f"[bold]{load}")
        yield row
