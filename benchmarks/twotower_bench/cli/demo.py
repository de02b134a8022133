"""`twotower-spec demo`: the bundled trio in real vLLM, TwoTower for a larger verifier and for itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer

from twotower_bench.cli.options import MOST_REPEATS
from twotower_bench.cli.tables import print_table
from twotower_bench.demo import DemoRow, Sizes, Use, demo_engines, demo_uses, measure
from twotower_bench.engines import EngineProcess, Piece
from twotower_bench.environment import engine_environment
from twotower_bench.records import BASELINE
from twotower_spec.cli.demo import demo as standalone_demo
from twotower_spec.config import check_integer
from twotower_spec.demo import HeldOutPrompt, demo_prompts
from twotower_spec.errors import ArgumentError
from twotower_spec.files import check_writable, write_atomically
from twotower_spec.machine import describe_machine
from twotower_spec.terminal import Terminal, styled

DEFAULT_PROMPTS, DEFAULT_NEW_TOKENS, DEFAULT_REPEATS = 4, 64, 3
STANDALONE_PROMPTS, STANDALONE_NEW_TOKENS = 2, 128
STREAMED_TOKENS = 128
# Of one category, and what max_model_len leaves beside the longest prompt.
MOST_PROMPTS = 72
MOST_NEW_TOKENS = 384
COLUMNS = ("system", "tokens/s", "speed-up", "acceptance length", "identical")


def demo(
    prompts: Annotated[
        int | None,
        typer.Option(help=f"Prompts per category; default: {DEFAULT_PROMPTS} at batch 1, {STANDALONE_PROMPTS} alone."),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help=f"Most new tokens per prompt; default: {DEFAULT_NEW_TOKENS}, {STANDALONE_NEW_TOKENS} alone."),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(help=f"Passes, of which medians are taken; default: {DEFAULT_REPEATS}.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table to this file, too.")] = None,
    standalone: Annotated[
        bool, typer.Option("--standalone", help="The TwoTower model alone, in its four modes, without vLLM.")
    ] = False,
) -> None:
    """Speculate in vLLM with the bundled models, on held-out prompts.

    TwoTower drafts for a larger verifier, beside no speculation, n-gram lookup and a draft model, and then for itself.
    """
    _check_number("--prompts", prompts, MOST_PROMPTS)
    _check_number("--max-new-tokens", max_new_tokens, MOST_NEW_TOKENS)
    _check_number("--repeats", repeats, MOST_REPEATS)
    console = Terminal()
    has_vllm = find_spec("vllm") is not None
    if standalone or not has_vllm:
        if repeats is not None or json_file is not None:
            raise ArgumentError("--repeats and --json are about the comparison in vLLM; leave them out without it")
        if not has_vllm and not standalone:
            _say(console, "vLLM is not installed (see CONTRIBUTING.md), so this is the TwoTower model on its own.")
        standalone_demo(prompts or STANDALONE_PROMPTS, max_new_tokens or STANDALONE_NEW_TOKENS)
        return
    if json_file is not None:
        check_writable(json_file)
    sizes = Sizes(prompts or DEFAULT_PROMPTS, max_new_tokens or DEFAULT_NEW_TOKENS, repeats or DEFAULT_REPEATS)
    run_demo(console, sizes, json_file)


def run_demo(console: Terminal, sizes: Sizes, json_file: Path | None = None, verifier: Path | None = None) -> None:
    """Text of TwoTower as it comes, then the table.

    Args:
        console: where both go.
        sizes: how much is measured.
        json_file: gets the table, too.
        verifier: directory of another verifier than the bundled one.

    Raises:
        ChildError: an engine failed; its last lines are in it.
    """
    uses = demo_uses(verifier)
    drafting = [use.engines[-1] for use in uses]
    names = [name for use in uses for name in use.engines]
    _say(console, "Loading vLLM, in a process of its own for every system.")
    with demo_engines(uses) as engines:
        with console.status("loading vLLM with TwoTower"):
            engine = engines.use(drafting[0])
        if engines.together:
            engines.start(names)
        vllm_version = engine.wait_until_ready().version
        # One prompt per category, while the other engines load.
        show_texts(console, engine, demo_prompts(1))
        if engines.together:
            _say(console, "And the same model for itself: its context tower is what verifies.")
            with console.status("loading the other systems"):
                engine = engines.use(drafting[1])
            # Before it has learnt anything, and while others load, adaptive drafting may be none.
            engine.draft_by({"policy": "fixed"})
            show_texts(console, engine, demo_prompts(1)[:1])
            engine.draft_by({})
        _say(
            console,
            f"Measuring {2 * sizes.prompts} prompts one by one and 16 with 8 at once, maths and Python, up to "
            f"{sizes.max_new_tokens} new tokens each. The first pass of each is for warming up: in it TwoTower's "
            f"adaptive policy learns what pays, as in a server that has run for a while. {sizes.repeats} more count, "
            f"all systems in turn.",
        )
        with console.status("loading the other systems") as status:
            engines.load(names)
            rows = [row for use in uses for row in measure(engines, use, sizes, status.update)]
    if threads := engine_environment().get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))  # as the engines had; the description of the machine says so
    machine, versions = describe_machine(), _versions(vllm_version)
    print_rows(console, uses, rows)
    _say(console, f"float32, greedy; {machine}, vllm {vllm_version}, twotower-spec {versions['twotower-spec']}")
    if json_file is not None:
        record = {"machine": machine, "versions": versions, "rows": [asdict(row) for row in rows]}
        write_atomically(json_file, json.dumps(record, indent=1) + "\n")


def show_texts(console: Terminal, engine: EngineProcess, prompts: Sequence[HeldOutPrompt]) -> None:
    """Prompts and their texts as an engine writes them, after one that is not shown."""
    with console.status("warming up TwoTower"):
        list(engine.stream(prompts[0].prompt, STREAMED_TOKENS))
    for prompt in prompts:
        print_text(console, prompt, engine.stream(prompt.prompt, STREAMED_TOKENS))


def print_text(console: Terminal, prompt: HeldOutPrompt, pieces: Iterable[Piece]) -> None:
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
        styled(
            f"\n[{num_steps + num_accepted} tokens in {num_steps} steps of the verifier: "
            f"{num_accepted} accepted drafts{colour} and {num_steps} of its own]\n",
            "italic",
        )
    )


def print_rows(console: Terminal, uses: Sequence[Use], rows: Sequence[DemoRow]) -> None:
    """All rows, uses and batch sizes apart, with the speed-up over no speculation."""
    use_titles = {use.name: use.title for use in uses}
    titles = {system.name: system.title for use in uses for system in use.systems}
    plain = {(row.use, row.batch_size): row.tokens_per_s for row in rows if row.system == BASELINE}
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        texts = (
            titles[row.system],
            f"{row.tokens_per_s:.0f}",
            f"{row.tokens_per_s / plain[row.use, row.batch_size]:.2f}",
            f"{row.acceptance_length:.2f}",
            "yes" if row.identical else "no",
        )
        group = f"{use_titles[row.use]}, batch {row.batch_size}"
        groups.setdefault(group, []).append(dict(zip(COLUMNS, texts, strict=True)))
    print_table(console, COLUMNS, groups)


def _versions(vllm_version: str) -> dict[str, str]:
    return {
        "vllm": vllm_version,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "twotower-spec": version("twotower-spec"),
    }


def _check_number(name: str, value: int | None, most: int) -> None:
    if value is not None:
        check_integer(name, value, minimum=1, maximum=most)


def _say(console: Terminal, text: str) -> None:
    console.print(text, soft_wrap=True)
