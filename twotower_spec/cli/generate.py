"""`twotower-spec generate`: one prompt or a bulk run, in any of the four modes."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedTokenizerBase

from twotower_spec.checkpoint import end_token_ids, load_tokenizer, resolve_checkpoint
from twotower_spec.cli.interrupts import Interrupts
from twotower_spec.cli.output import ResumableOutput
from twotower_spec.cli.prompts import Prompt, encode, read_prompts
from twotower_spec.config import TwoTowerConfig, check_integer
from twotower_spec.demo import trio_path
from twotower_spec.generation import MODES, GenerationOptions, GenerationResult, Mode
from twotower_spec.generation.batch import parse_eos, parse_prompts, parse_seeds
from twotower_spec.generation.options import BLOCK_DEFAULTS
from twotower_spec.model import TwoTowerModel, as_dtype
from twotower_spec.printable import printable
from twotower_spec.terminal import progress_bar
from twotower_spec.towers.model import usable_device


def generate(
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts as text.", show_default=False)] = None,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint: a directory or a hub id; default: the bundled small one.")
    ] = None,
    mode: Annotated[Mode, typer.Option(help="How to generate.")] = Mode.MASK_DIFFUSION,
    token_ids: Annotated[list[str] | None, typer.Option(help="A prompt as ids: 12,44,7. Repeatable.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help='One prompt per line; .jsonl with "prompt", "text" or "token_ids"; - is stdin.')
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write JSON lines here; a stopped run goes on.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin --output anew.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per prompt.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Most new tokens per prompt.")] = 128,
    block_size: Annotated[
        int | None, typer.Option("--block-size", "-S", help="Tokens per block; default: 16, self-speculative 8.")
    ] = None,
    steps_per_block: Annotated[
        int | None,
        typer.Option("--steps-per-block", "--steps", help="Most denoising steps; default: 16, self-speculative 1."),
    ] = None,
    confidence_threshold: Annotated[
        float, typer.Option("--confidence-threshold", "--gamma", help="Commit picks more probable than this.")
    ] = 0.8,
    mask_token_id: Annotated[int | None, typer.Option(help="Default: the checkpoint's, else 3.")] = None,
    temperature: Annotated[float, typer.Option(help="0 for greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among tokens up to this probability.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling noise; prompt i uses seed + i.")] = 0,
    eos_token_id: Annotated[
        list[int] | None, typer.Option(help="Ids that end a row. Default: the checkpoint's. Repeatable.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Run to --max-new-tokens.")] = False,
    batch_size: Annotated[int, typer.Option(help="Prompts generated together.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16, float64; default: stored.")] = None,
    denoiser_dtype: Annotated[str | None, typer.Option(help="The denoiser's; default: the same.")] = None,
    context_device: Annotated[str, typer.Option(help="Where the context tower runs.")] = "cpu",
    denoiser_device: Annotated[str | None, typer.Option(help="Where the denoiser runs; default: same.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
) -> None:
    """Generate text or token ids.

    A row ends at an end-of-sequence token. A diffusion block that holds one is kept whole in token_ids; printed text
    stops at it.
    """
    # Everything that can be refused is checked before weights are read.
    check_integer("--batch-size", batch_size, minimum=1)
    check_integer("--max-new-tokens", max_new_tokens, minimum=1)
    as_dtype(dtype)
    as_dtype(denoiser_dtype)
    usable_device(context_device)
    usable_device(denoiser_device or context_device)
    prompts = read_prompts(prompt or [], token_ids or [], prompt_file)
    directory = resolve_checkpoint(model or trio_path("twotower"), revision)
    config = TwoTowerConfig.from_pretrained(directory)
    tokenizer = load_tokenizer(directory)
    prompts = encode(prompts, tokenizer)
    rows = parse_prompts([p.token_ids or [] for p in prompts], config.vocab_size)
    if mask_token_id is not None:
        config = config.replace(mask_token_id=mask_token_id)
    ends = eos_token_id or end_token_ids(directory, tokenizer, config.vocab_size)
    eos = [] if ignore_eos else sorted(parse_eos(ends, config.vocab_size))
    has_blocks = mode in BLOCK_DEFAULTS
    options = GenerationOptions(
        mode=mode,
        max_new_tokens=max_new_tokens,
        block_size=block_size if has_blocks else None,
        steps_per_block=steps_per_block if has_blocks else None,
        confidence_threshold=confidence_threshold if has_blocks else None,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        mask_token_id=config.mask_token_id,
        eos_token_id=eos,
        seed=seed,
    )
    run = _fingerprint(directory, config, [dtype, denoiser_dtype], options, rows)
    seeds = parse_seeds(seed, len(rows))
    with ResumableOutput(output, run, overwrite) if output else nullcontext() as sink:
        left = [i for i in range(len(rows)) if sink is None or i not in sink.done]
        if not left:
            print(f"all {len(rows)} rows are in {output} already", file=sys.stderr)
            return
        towers = TwoTowerModel.from_pretrained(
            directory,
            towers="both" if MODES[mode].needs_denoiser else "context",
            dtype=dtype,
            denoiser_dtype=denoiser_dtype,
            context_device=context_device,
            denoiser_device=denoiser_device,
        )
        with progress_bar() as bar, Interrupts() as interrupts:
            task = bar.add_task("generating", total=len(rows), completed=len(rows) - len(left))
            for start in range(0, len(left), batch_size):
                indices = left[start : start + batch_size]
                own = replace(options, seed=[seeds[i] for i in indices])
                result = towers.generate([rows[i] for i in indices], own)
                records = list(_records(indices, prompts, result, tokenizer, eos))
                if sink:
                    sink.append(records)
                else:
                    _print(records, as_json)
                bar.advance(task, len(indices))
                interrupts.check()


def _records(
    indices: list[int],
    prompts: list[Prompt],
    result: GenerationResult,
    tokenizer: PreTrainedTokenizerBase | None,
    eos_token_ids: list[int],
) -> Iterator[dict[str, Any]]:
    """One JSON object per row; times and speed are those of the batch, the speed counting the row's own tokens."""
    for row, index in enumerate(indices):
        tokens, passes = result.token_ids[row], result.num_denoiser_passes[row]
        record: dict[str, Any] = {
            "index": index,
            "token_ids": tokens,
            "num_denoiser_passes": passes,
            "tokens_per_denoiser_pass": len(tokens) / passes if passes else None,
            "num_context_passes": result.num_context_passes[row],
            "tokens_per_s": len(tokens) / result.times.total_s,
            "prefill_s": result.times.prefill_s,
            "denoise_s": result.times.denoise_s,
            "extend_s": result.times.extend_s,
            "batch_size": len(indices),
        }
        if prompts[index].text is not None:
            record["prompt"] = prompts[index].text
        if tokenizer is not None:
            ends = [i for i, token in enumerate(tokens) if token in eos_token_ids]
            shown = tokens[: ends[0]] if ends else tokens
            record["text"] = tokenizer.decode(shown, skip_special_tokens=True)
        yield record


def _print(records: list[dict[str, Any]], as_json: bool) -> None:
    for record in records:
        if as_json:
            line = json.dumps(record)
        else:
            line = record.get("text", ",".join(map(str, record["token_ids"])))
        # A file gets the text as it is.
        sys.stdout.write((printable(line, keep="\n\t") if sys.stdout.isatty() else line) + "\n")
        sys.stdout.flush()


def _fingerprint(
    directory: Path,
    config: TwoTowerConfig,
    dtypes: list[str | None],
    options: GenerationOptions,
    rows: list[list[int]],
) -> str:
    """Identifies what a bulk run computes; batch size and devices are free to change between starts."""
    how = options.to_json()
    content = [str(directory.resolve()), config.to_dict(), how.pop("mode"), dtypes, how.pop("seed"), how, rows]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
