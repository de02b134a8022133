"""`twotower-spec bench standalone`: the model alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Hashable, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated

import typer

from twotower_bench.cli import options
from twotower_bench.cli.options import numbers
from twotower_bench.cli.tables import print_section
from twotower_bench.measurement_file import MeasurementFile
from twotower_bench.schedule import Say, Slot, complete, in_order
from twotower_spec.checkpoint import encode_texts, end_token_ids, load_tokenizer, resolve_checkpoint
from twotower_spec.config import TwoTowerConfig, check_integer
from twotower_spec.demo import trio_path
from twotower_spec.errors import ArgumentError
from twotower_spec.evaluation.datasets import load_prompts
from twotower_spec.evaluation.lm_eval_model import Loaded, Task
from twotower_spec.evaluation.standalone import Cell, Score, measure, sweep, warm_up
from twotower_spec.extras import require_extra
from twotower_spec.generation.batch import parse_prompts
from twotower_spec.generation.options import ModeOptions
from twotower_spec.machine import describe_machine
from twotower_spec.model import TwoTowerModel, as_dtype
from twotower_spec.terminal import Terminal
from twotower_spec.towers.model import usable_device


def standalone(
    model: Annotated[
        str | None, typer.Option(help="Checkpoint: a directory or a hub id; default: the bundled small one.")
    ] = None,
    dataset: options.Dataset = "trio",
    gamma: options.Gammas = "0.5,0.8,0.95",
    block_size: options.BlockSizes = "4,8,16",
    steps: options.Steps = "1,2,4,16",
    prompts: Annotated[int, typer.Option(help="Prompts, balanced over the dataset's categories.")] = 12,
    max_new_tokens: options.MaxNewTokens = 64,
    repeat: Annotated[int, typer.Option(help="Passes over everything, of which medians are taken.")] = 3,
    json_file: options.JsonFile = None,
    overwrite: options.Overwrite = False,
    task: Annotated[
        str | None, typer.Option(help="A generating task of lm-eval that every setting is scored on, too.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with lm-eval tasks of your own.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Solved examples in the task's prompts.")] = None,
    limit: Annotated[int | None, typer.Option(help="Most documents of the task.")] = None,
    batch_size: Annotated[int, typer.Option(help="Documents of the task generated together.")] = 8,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16, float64; default: stored.")] = None,
    context_device: Annotated[str, typer.Option(help="Where the context tower runs.")] = "cpu",
    denoiser_device: Annotated[str | None, typer.Option(help="Where the denoiser runs; default: same.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
) -> None:
    """Speed and fidelity of mask diffusion over gamma, block size and steps, beside AR, mock-AR and self-speculation.

    Greedy, one prompt at a time. Settings that are the same are run once: one step commits everything whatever gamma
    is, and a block takes no more steps than it has tokens.
    """
    # Everything that can be refused is checked before weights are read.
    require_extra("bench", *options.REPORTING)
    settings = sweep(numbers("--gamma", gamma, float), numbers("-S", block_size, int), numbers("--steps", steps, int))
    for name, value in (("--max-new-tokens", max_new_tokens), ("--batch-size", batch_size)):
        check_integer(name, value, minimum=1)
    options.check_repeat(repeat)
    as_dtype(dtype)
    usable_device(context_device)
    usable_device(denoiser_device or context_device)
    if task is None and (include_path, num_fewshot, limit) != (None, None, None):
        raise ArgumentError("--include-path, --num-fewshot and --limit are about a task; name one with --task")
    wanted = Task(task, include_path, num_fewshot, limit) if task else None
    if wanted:
        wanted.check()
    texts = load_prompts(dataset, limit=prompts)
    directory = resolve_checkpoint(model or trio_path("twotower"), revision)
    config = TwoTowerConfig.from_pretrained(directory)
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        raise ArgumentError(
            f"{directory} has no tokenizer, and prompts are text; put tokenizer.json beside its weights"
        )
    rows = parse_prompts(encode_texts(tokenizer, [prompt.text for prompt in texts]), config.vocab_size)
    eos = end_token_ids(directory, tokenizer, config.vocab_size)
    content = [str(directory.resolve()), config.to_dict(), dtype, max_new_tokens, eos, rows]
    file = MeasurementFile[Cell | Score](content, {"cell": Cell, "score": Score}, _key, ["lm-eval"])

    @cache
    def towers() -> TwoTowerModel:
        return TwoTowerModel.from_pretrained(
            directory, dtype=dtype, context_device=context_device, denoiser_device=denoiser_device
        )

    def measured(slots: Sequence[Slot[ModeOptions, None]], say: Say) -> Generator[Cell]:
        warm: set[ModeOptions] = set()
        for slot in slots:
            say(slot.subject.label)
            if slot.subject not in warm:
                warm_up(towers(), slot.subject, rows, max_new_tokens)
                warm.add(slot.subject)
            yield measure(towers(), slot.subject, slot.repeat, rows, max_new_tokens, eos)

    scores: list[Score] = []
    with file.opened(json_file, overwrite):
        slots = in_order(settings, [None], repeat)
        cells = complete(file, slots, lambda slot: (slot.subject, slot.repeat), measured)
        for setting in settings if wanted else ():
            assert wanted is not None
            key = setting, json.dumps(wanted.to_json())
            if key not in file.found:
                # lm-eval has bars of its own.
                print(f"{wanted.name}: {setting.label}", file=sys.stderr)
                score = wanted.score(Loaded(towers(), tokenizer, eos), setting, batch_size)
                file.keep(Score(setting, score, wanted.to_json()))
            found = file.found[key]
            assert isinstance(found, Score)
            scores.append(found)
    from twotower_bench.report.reading import Measurements  # matplotlib
    from twotower_bench.report.standalone import standalone_section

    console = Terminal()
    found_cells = [cell for cell in cells if isinstance(cell, Cell)]
    print_section(console, standalone_section(Measurements("", cells=found_cells, scores=scores)))
    console.print(
        f"{len(rows)} prompts of {dataset}, up to {max_new_tokens} new tokens, batch 1, greedy, {repeat} repeats; "
        f"{describe_machine()}",
        soft_wrap=True,
    )


def _key(item: Cell | Score) -> Hashable:
    """A file goes on with more settings, repeats or another task."""
    return item.setting, item.repeat if isinstance(item, Cell) else json.dumps(item.task)
