"""What the demo shows and writes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from twotower_bench.demo.measuring import DemoRow
from twotower_bench.engines import Piece
from twotower_bench.records import System
from twotower_spec.demo import HeldOutPrompt


def print_text(console: Console, prompt: HeldOutPrompt, pieces: Iterable[Piece]) -> None:
    """A prompt and its text as it comes, accepted drafts in green, then how many there were."""
    console.rule(f"{prompt.category}, held out by {prompt.held_out}: {prompt.source}")
    console.out(prompt.prompt, style="dim", highlight=False, end="")
    num_steps = num_accepted = 0
    for piece in pieces:
        console.out(piece.accepted, style="green", highlight=False, end="")
        console.out(piece.own, highlight=False, end="")
        num_steps, num_accepted = num_steps + 1, num_accepted + piece.num_accepted_tokens
    colour = ", in green," if console.color_system else ""
    console.print(
        Text(
            f"\n[{num_steps + num_accepted} tokens in {num_steps} steps of the verifier: "
            f"{num_accepted} accepted drafts{colour} and {num_steps} of its own]\n",
            style="italic",
        )
    )


def print_table(console: Console, systems: Sequence[System], rows: Sequence[DemoRow]) -> None:
    """All rows, batch sizes apart, with the speed-up over no speculation."""
    titles = {system.name: system.title for system in systems}
    without = {row.batch_size: row.tokens_per_s for row in rows if row.system == "none"}
    table = Table("batch", "system")
    for heading in ("tokens/s", "speed-up", "acceptance length"):
        table.add_column(heading, justify="right")
    table.add_column("identical")
    for batch_size, plain in without.items():
        table.add_section()
        for row in rows:
            if row.batch_size == batch_size:
                table.add_row(
                    str(batch_size),
                    titles[row.system],
                    f"{row.tokens_per_s:.0f}",
                    f"{row.tokens_per_s / plain:.2f}",
                    f"{row.acceptance_length:.2f}",
                    "yes" if row.identical else "no",
                )
    console.print(table)


def as_json(machine: str, versions: Mapping[str, str], rows: Sequence[DemoRow]) -> str:
    """The same as one JSON object."""
    record: dict[str, Any] = {"machine": machine, "versions": dict(versions), "rows": [asdict(row) for row in rows]}
    return json.dumps(record, indent=1) + "\n"
