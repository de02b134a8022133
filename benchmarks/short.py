"""The short form of every benchmark, in less than 15 minutes on two cores: `python -m benchmarks.short`.

Ops beside their rivals with pytest-benchmark, then the trio: alone, in vLLM by category, swept, and as a server.
The report goes to .benchmarks/report, its tables into docs/benchmarks.md.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.readme import markdown_table, write_section
from twotower_bench.report import write_report
from twotower_bench.report.markdown import section_lines

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".benchmarks" / "report"
DOCUMENT = ROOT / "docs" / "benchmarks.md"
OPS = FOLDER / "ops.json"
# Of the report's tables, those that stand in the document.
TABLES = frozenset(
    {
        "Speed and latency",
        "What drafts gain",
        "Best at each concurrency",
        "Throughput and goodput",
        "Speed and fidelity",
    }
)

STEPS: dict[str, Sequence[str]] = {
    "ops": (
        *("pytest", "benchmarks/", "--benchmark-only", "-q", "--benchmark-max-time=0.1", "--benchmark-min-rounds=3"),
        *("--benchmark-columns=median", "-k", "not bfloat16 and not mask_diffusion and not mock_ar"),
        f"--benchmark-json={OPS.relative_to(ROOT)}",
    ),
    "standalone": (
        *("bench", "standalone", "--gamma", "0.5,0.8,0.95", "-S", "8,16", "--steps", "1,16", "--prompts", "6"),
        *("--max-new-tokens", "48"),
    ),
    "acceptance": (
        *("bench", "acceptance", "--concurrency", "1,4", "--prompts", "12", "--max-new-tokens", "48", "--repeat", "3"),
    ),
    "sweep": (
        *("bench", "sweep", "-S", "8,16", "--steps", "1", "--policy", "fixed,adaptive", "--concurrency", "1,4,8,16"),
        *("--prompts", "16", "--max-new-tokens", "32", "--repeat", "3"),
    ),
    "serve": (
        *("bench", "serve", "--only", "twotower", "--concurrency", "1,8", "--request-rate", "2"),
        *("--prompts", "12", "--max-new-tokens", "32", "--repeat", "3"),
    ),
}


def main() -> None:
    """Runs the steps that are named, or all; "report" alone is none. What was measured before stays in the report."""
    wanted = sys.argv[1:] or list(STEPS)
    if unknown := set(wanted) - {*STEPS, "report"}:
        sys.exit(f"{', '.join(sorted(unknown))} is not there; give some of {', '.join((*STEPS, 'report'))}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in (one for one in STEPS if one in wanted):
        command = list(STEPS[name])
        if name != "ops":
            command += ["--json", str((FOLDER / f"{name}.jsonl").relative_to(ROOT)), "--overwrite"]
        if name == "sweep":
            command += ["--profile", str((FOLDER / "profile.json").relative_to(ROOT))]
        _run(command)
    files = [path for name in STEPS if (path := FOLDER / f"{name}.jsonl").exists()]
    report = write_report(files, FOLDER)
    parts = [f"Written on {time.strftime('%Y-%m-%d')}."]
    for section in report.sections:
        tables = tuple(table for table in section.tables if table.title in TABLES)
        parts.append("\n".join(section_lines(replace(section, tables=tables), level=3)))
    if OPS.exists():
        parts.append(_ops())
    write_section("short form", "\n\n".join(parts), DOCUMENT)
    print(f"{FOLDER.relative_to(ROOT)}/report.html, and the section of {DOCUMENT.relative_to(ROOT)}")


def _ops() -> str:
    """Table of what pytest-benchmark measured; ratios are of rounds that alternated."""
    result = json.loads(OPS.read_text(encoding="utf-8"))
    info, rows = result["machine_info"], []
    for one in result["benchmarks"]:
        extra = {name: value for name, value in one["extra_info"].items() if name.startswith("speed-up over ")}
        rivals = ", ".join(f"{value:g} over {name.removeprefix('speed-up over ')}" for name, value in extra.items())
        name = one["group"] if extra else f"{one['group']}: {one['name'].partition('[')[2].rstrip(']')}"
        rows.append((name, f"{1e3 * one['stats']['median']:.3g}", rivals))
    where = f"{info['processor']}, {info['cores']} cores, {info['threads']} threads; torch {info['torch']}"
    where += f"; commit {info['commit']}; `{shlex.join(STEPS['ops'])}`"
    table = markdown_table(["op, shape", "ms", "speed-up"], rows)
    return f"### Ops on a CPU\n\n{table}\n\n{where}"


def _run(command: Sequence[str]) -> None:
    print(f"\n$ {shlex.join(command)}", flush=True)
    start = time.monotonic()
    module = ["-m"] if command[0] == "pytest" else ["-m", "twotower_spec.cli"]
    subprocess.run([sys.executable, *module, *command], cwd=ROOT, check=True)
    print(f"{time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
