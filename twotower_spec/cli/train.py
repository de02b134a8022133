"""`twotower-spec train`: the stages of a training one by one, or all of them."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live
from rich.table import Table

from twotower_spec.cli.prompts import read_prompts
from twotower_spec.demo import CATEGORIES, held_out_prompts, trio_directory
from twotower_spec.errors import ArgumentError
from twotower_spec.extras import require_extra
from twotower_spec.files import write_atomically
from twotower_spec.machine import describe_machine
from twotower_spec.reading import is_directory
from twotower_spec.recorded_command import recorded_command
from twotower_spec.terminal import Terminal
from twotower_spec.training.evaluation import EvaluationRow, TrioFiles, evaluate_side_by_side
from twotower_spec.training.model_card import write_model_cards
from twotower_spec.training.pipeline import STAGES, Job, default_device, train_all
from twotower_spec.training.workspace import keep_standard_input

app = typer.Typer(
    help="Train a drafter: a trio from a recipe, or towers for a verifier of your own.",
    no_args_is_help=True,
)

Output = Annotated[Path, typer.Option(help="Folder of the training; a stopped one goes on from its checkpoints.")]
RecipeFile = Annotated[Path | None, typer.Option(help="TOML file, or a bundled recipe: trio (default), trio-gpu.")]
Verifier = Annotated[Path | None, typer.Option(help="Directory of your own verifier; towers share its tokenizer.")]
Text = Annotated[list[Path] | None, typer.Option(help='Your own text: UTF-8 files, or .jsonl with "text"; - is stdin.')]
MoreText = Annotated[list[Path] | None, typer.Argument(help="More files for --text.", show_default=False)]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")]

SIDE_BY_SIDE = min(2, os.cpu_count() or 1)
# The two kinds of real text are measured apart.
REAL_TEXTS = {"split": "gsm8k", "file": "standard library"}


def _texts(text: list[Path] | None, more_text: list[Path] | None, output: Path) -> list[Path]:
    return keep_standard_input([*(text or []), *(more_text or [])], output)


def _add_stage(stage: str, summary: str) -> None:
    def command(
        output: Output,
        recipe: RecipeFile = None,
        verifier: Verifier = None,
        text: Text = None,
        more_text: MoreText = None,
        device: Device = None,
    ) -> None:
        job = Job(output, recipe, verifier, _texts(text, more_text, output), device)
        print(job.run(stage))

    app.command(stage, help=summary)(command)


_add_stage("tokenizer", "Train the byte-level BPE that all models share.")
_add_stage("verifier", "Train the verifier on the corpus.")
_add_stage("context", "Train the context tower on the corpus.")
_add_stage("distill", "Sample text from the verifier and go on with the context tower on it; it is frozen then.")
_add_stage("denoiser", "Train the denoiser on the frozen context tower; the checkpoint is whole then.")
_add_stage("draft", "Train the autoregressive draft model, the towers' rival.")
assert {command.name for command in app.registered_commands} == set(STAGES)


@app.command("all")
def train_everything(
    output: Output,
    recipe: RecipeFile = None,
    verifier: Verifier = None,
    text: Text = None,
    more_text: MoreText = None,
    device: Device = None,
    processes: Annotated[int, typer.Option(help="Stages that may run side by side.", min=1)] = SIDE_BY_SIDE,
) -> None:
    """Run every stage of the recipe, in order."""
    job = Job(output, recipe, verifier, _texts(text, more_text, output), device)
    for path in train_all(job, processes):
        print(path)


@app.command()
def evaluate(
    output: Annotated[
        Path | None, typer.Option(help="Folder of a finished training; default: the bundled trio.")
    ] = None,
    verifier: Verifier = None,
    prompt_file: Annotated[
        list[Path] | None, typer.Option(help="Prompts of your own, a category per file; default: held-out prompts.")
    ] = None,
    prompts: Annotated[int | None, typer.Option(help="Most prompts per category.", min=1)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the verifier's texts.", min=2)] = 128,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    device: Device = None,
    processes: Annotated[int, typer.Option(help="Categories measured side by side.", min=1)] = SIDE_BY_SIDE,
) -> None:
    """Measure acceptance lengths against the verifier's own text; writes model cards into --output."""
    require_extra("train", "scipy")
    if json_file and not is_directory(json_file.parent):
        raise ArgumentError(f"the folder of --json {json_file} is not there; make it first")
    texts = _prompt_texts(prompt_file or [])
    if prompts:
        # Spread evenly over the file, so that every kind of held-out prompt is included.
        texts = {name: rows[:: max(1, len(rows) // prompts)][:prompts] for name, rows in texts.items()}
    files = TrioFiles(output or trio_directory(), verifier, default_device(device))
    table = Table("category", "temperature", "drafter", "K", "acceptance length", "95 % interval", "passes", "prompts")
    with Live(table, console=Terminal(stderr=True), transient=True):
        result = evaluate_side_by_side(files, texts, max_new_tokens, processes, lambda row: _add_row(table, row))
    Terminal(highlight=True).print(table)
    for name, fraction in result["repeated_4gram_fraction"].items():
        print(f"repeated 4-grams in the verifier's greedy text, {name}: {fraction:.3f}")
    result |= {"machine": describe_machine(), "command": recorded_command()}
    if json_file:
        write_atomically(json_file, json.dumps(result, indent=1) + "\n")
    if output:
        for card in write_model_cards(output, result):
            print(card)


def _prompt_texts(files: list[Path]) -> dict[str, list[str]]:
    """Prompts by category: from the user's files, or else the held-out ones."""
    texts: dict[str, list[str]] = {}
    if not files:
        for row in itertools.chain.from_iterable(map(held_out_prompts, CATEGORIES)):
            texts.setdefault(REAL_TEXTS.get(row.held_out, row.category), []).append(row.prompt)
        return texts
    for file in files:
        rows = [prompt.text for prompt in read_prompts([], [], file)]
        if file.stem in texts:
            raise ArgumentError(f"two prompt files are named {file.stem}; rename one, names are categories")
        if not all(rows):
            raise ArgumentError(f"prompt file {file} has prompts without text; give text, not token ids")
        texts[file.stem] = [row for row in rows if row]
    return texts


def _add_row(table: Table, row: EvaluationRow) -> None:
    table.add_row(
        row.category,
        f"{row.temperature:g}",
        row.system,
        str(row.num_tokens),
        f"{row.acceptance_length:.2f}",
        f"{row.low:.2f} to {row.high:.2f}",
        f"{row.passes_per_step:.1f}",
        str(row.num_prompts),
    )
