"""`twotower-spec doctor`: what is wrong with two models and the machine that shall serve them, and what to do."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Annotated, get_args

import typer
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from twotower_spec.demo.trio import trio_path
from twotower_spec.diagnosis import Case, Finding, Verdict, examine
from twotower_spec.diagnosis.case import default_device, holds_two_towers
from twotower_spec.terminal import Terminal, styled

# Characters of a line below which what was found stands below what was looked at.
NARROW = 70
STYLES: dict[Verdict, str] = {"ok": "green", "warning": "yellow", "fault": "bold red", "skipped": "dim"}


def doctor(
    verifier: Annotated[str | None, typer.Option(help="Model to be served: a directory or a hub id.")] = None,
    drafter: Annotated[
        str | None, typer.Option(help="TwoTower checkpoint that drafts for it; without both the bundled models.")
    ] = None,
    num_speculative_tokens: Annotated[int, typer.Option(help="Drafts per request and step.")] = 7,
    max_num_seqs: Annotated[int, typer.Option(help="Requests at once.")] = 16,
    context_length: Annotated[int, typer.Option(help="Tokens per request.")] = 4096,
    tensor_parallel_size: Annotated[int, typer.Option(help="Ranks that share the verifier.")] = 1,
    device: Annotated[str | None, typer.Option(help="The verifier's; default: cuda where there is any.")] = None,
    context_device: Annotated[str | None, typer.Option(help="The context tower's; default: the verifier's.")] = None,
    denoiser_device: Annotated[str | None, typer.Option(help="The denoiser's; default: the context tower's.")] = None,
    experts_dtype: Annotated[
        str | None, typer.Option(help="Of the drafter's experts: float8_e4m3fn, int8 or int4; default: as stored.")
    ] = None,
    memory_gib: Annotated[
        float | None, typer.Option(help="Memory of each device, in place of what this machine has.")
    ] = None,
    run: Annotated[
        bool | None, typer.Option("--run/--no-run", help="Run both models; default: where they are small.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the drafter's hub id.")] = None,
) -> None:
    """Look for everything that is known to go wrong: what was looked at, what was found, and what to do.

    Exit code 0: a server can be started. 1: there is a fault, with which it would not start or its drafts would be
    worth nothing. 2: an argument is not allowed. Warnings (slower, fewer drafts accepted) and what was skipped leave it
    at 0; with one model alone it speaks of that model, and `can_serve` in JSON is null.
    """
    disable_progress_bar()  # of transformers, in the midst of the table
    is_bundled = drafter is None and verifier is None
    if is_bundled:
        drafter, verifier = str(trio_path("twotower")), str(trio_path("verifier"))
    elif drafter is None and verifier is not None and holds_two_towers(verifier):
        drafter = verifier
    case = Case(
        drafter,
        verifier,
        revision,
        num_speculative_tokens=num_speculative_tokens,
        max_num_seqs=max_num_seqs,
        tensor_parallel_size=tensor_parallel_size,
        context_length=context_length,
        verifier_device=device or default_device(),
        context_device=context_device,
        denoiser_device=denoiser_device,
        experts_dtype=experts_dtype,
        memory_gib=memory_gib,
        run=run,
        is_bundled=is_bundled,
    )
    if as_json:
        findings = list(examine(case))
        print(json.dumps(_as_dict(case, findings)))
    else:
        findings = _show(case, Terminal())
    if any(finding.verdict == "fault" for finding in findings):
        raise typer.Exit(1)


def _as_dict(case: Case, findings: Sequence[Finding]) -> dict[str, object]:
    counts = Counter(finding.verdict for finding in findings)
    return {
        "drafter": case.drafter,
        "verifier": case.verifier,
        "can_serve": False if counts["fault"] else True if case.is_pair else None,
        "summary": {verdict: counts[verdict] for verdict in get_args(Verdict)},
        "findings": [asdict(finding) for finding in findings],
    }


def _show(case: Case, console: Terminal) -> list[Finding]:
    """Prints findings area by area, as they are made."""
    for what, model in (("drafter", case.drafter), ("verifier", case.verifier)):
        console.print(f"{what:<9}{model or 'none'}", soft_wrap=True, highlight=False)
    shown: list[Finding] = []
    for area, group in groupby(examine(case), key=lambda finding: finding.area):
        is_narrow = console.width < NARROW
        table = Table.grid(padding=(0, 2))
        table.add_column(width=7)
        table.add_column(width=None if is_narrow else 24, overflow="fold")
        if not is_narrow:
            table.add_column(overflow="fold")
        for finding in group:
            shown.append(finding)
            style = STYLES[finding.verdict]
            told = [styled(finding.detail)]
            if finding.remedy:
                told.append(styled(f"remedy: {finding.remedy}", style))
            first = [] if is_narrow else [told.pop(0)]
            table.add_row(styled(finding.verdict, style), finding.looked_at, *first)
            for text in told:
                table.add_row(*[""] * len(first), "", text)
        console.print()
        console.print(styled(area, "bold"))
        console.print(table)
    counts = Counter(finding.verdict for finding in shown)
    says = ", ".join(f"{counts[verdict]} {verdict}" for verdict in get_args(Verdict))
    if counts["fault"]:
        outcome = "a server would not start, or its drafts would be worth nothing"
    elif case.is_pair:
        outcome = "nothing stands against a server"
    else:
        outcome = "name both models to see whether a server can be started"
    console.print()
    console.print(styled(f"{says}: {outcome}", STYLES["fault" if counts["fault"] else "ok"]), soft_wrap=True)
    return shown
