"""`twotower-spec demo --standalone`: the bundled model at work without vLLM, on prompts it was never trained on.

Where `vllm_twotower` is installed, its command of the same name takes the place of this one and calls it.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.rule import Rule
from rich.table import Table

from twotower_spec.demo import demo_prompts, run_modes
from twotower_spec.demo.standalone import DemoText
from twotower_spec.machine import describe_machine
from twotower_spec.terminal import Terminal, styled


def demo(
    prompts: Annotated[int, typer.Option(help="Prompts per category.", min=1, max=60)] = 2,
    max_new_tokens: Annotated[int, typer.Option(help="Most new tokens per prompt.", min=1)] = 128,
) -> None:
    """Generate with the bundled TwoTower model in its four modes, on held-out prompts, and compare them."""
    torch.set_num_threads(min(torch.get_num_threads(), 2))  # the matrices are small: more threads would only wait
    console = Terminal()
    texts: list[DemoText] = []
    shown = None
    for text in run_modes(demo_prompts(prompts), max_new_tokens):
        if text.prompt is not shown:
            shown = text.prompt
            console.print(Rule(f"{shown.category}, held out by {shown.held_out}: {shown.source}"))
            console.print(styled(shown.prompt, "dim"))
        remark = " (this denoiser was trained on masked blocks alone)" if text.mode == "mock-ar" else ""
        console.print(styled(f"[{text.mode}]{remark}", "bold"))
        console.print(styled(text.text.strip("\n"), "green" if text.mode == "mask-diffusion" else ""))
        texts.append(text)
    table = Table("mode", "tokens", "tokens per NFE", "tokens per context pass", "tokens/s")
    for mode in dict.fromkeys(text.mode for text in texts):
        rows = [text for text in texts if text.mode == mode]
        tokens = sum(row.num_tokens for row in rows)
        nfe, context = (sum(getattr(row, f"num_{tower}_passes") for row in rows) for tower in ("denoiser", "context"))
        speed = tokens / sum(row.seconds for row in rows)
        table.add_row(mode, str(tokens), _per(tokens, nfe), _per(tokens, context), f"{speed:.0f}")
    console.print(table)
    console.print(f"float32, batch 1; {describe_machine()}")


def _per(tokens: int, passes: int) -> str:
    return f"{tokens / passes:.2f}" if passes else "-"
