"""The table of the memory that a verifier and its drafter need in vLLM, for `twotower-spec inspect --verifier`."""

from __future__ import annotations

from typing import get_args

from rich.table import Table

from twotower_spec.printable import byte_text
from twotower_spec.serving_memory import Holder, MemoryLine, ServingMemory
from twotower_spec.terminal import Terminal, styled


def show_serving_memory(memory: ServingMemory, console: Terminal) -> None:
    """Prints every line with its formula, then what to set."""
    of_rank = " of the first rank" if memory.tensor_parallel_size > 1 else ""
    table = Table("", "formula", "each", "together", title=f"memory{of_rank} in vLLM", title_justify="left")
    for holder in get_args(Holder):
        table.add_section()
        table.add_row(styled(holder, "bold"))
        for line in memory.lines:
            if line.holder == holder:
                table.add_row(line.name, line.formula, _each(line), byte_text(line.total))
    console.print(table)
    for remark in _remarks(memory):
        console.print(remark, soft_wrap=True, highlight=False)


def _each(line: MemoryLine) -> str:
    return f"{line.count} {line.per}s x {byte_text(line.num_bytes)}" if line.per else ""


def _remarks(memory: ServingMemory) -> list[str]:
    remarks = [
        "M: Mamba layers, *: attention layers; others keep nothing of a request. vLLM rounds states up to whole pages.",
        "CUDA graphs come on top: what the drafter's take stands in the log, when its warm-up has captured them",
    ]
    if memory.has_one_context_tower:
        remarks.append("T drafts for itself: its denoiser reads the verifier's state, there is one context tower")
    if memory.unknown:
        remarks.append(f"not all is known: {memory.unknown}")
    fewest, most = memory.num_drafts
    reason = f"; every draft costs a request {byte_text(memory.state_bytes)} more" if memory.state_bytes else ""
    return [
        *remarks,
        f"sensible: --spec-tokens {fewest} to {most}{reason}",
        f"--max-num-batched-tokens {memory.max_num_batched_tokens} or more: then no request is left out of a step",
    ]
