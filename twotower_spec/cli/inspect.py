"""`twotower-spec inspect`: what is in a checkpoint and wrong with it, and whether it can draft for a verifier."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from twotower_spec.cli.serving_memory import show_serving_memory
from twotower_spec.config import check_integer
from twotower_spec.errors import ArgumentError
from twotower_spec.inspection import (
    Inspection,
    MemoryEstimate,
    PartSummary,
    VerifierMatch,
    compare_with_verifier,
    inspect_checkpoint,
)
from twotower_spec.printable import byte_text
from twotower_spec.serving_memory import serving_memory
from twotower_spec.terminal import Terminal

# Of what there is, the terminal shows so much; --json has all.
SHOWN_DIFFERENCES = 10
SHOWN_PROBLEMS = 100


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A directory or a hub id.")],
    verifier: Annotated[
        str | None,
        typer.Option(help="Compare tokenizers with this model instead: a directory or a hub id; reads no weights."),
    ] = None,
    num_requests: Annotated[int, typer.Option(help="Requests held at once.")] = 1,
    context_length: Annotated[int, typer.Option(help="Tokens per request.")] = 4096,
    dtype: Annotated[str | None, typer.Option(help="Dtype in memory; default: as stored.")] = None,
    experts_dtype: Annotated[
        str | None, typer.Option(help="Of routed experts in memory: float8_e4m3fn, int8 or int4; default: as stored.")
    ] = None,
    num_speculative_tokens: Annotated[
        int | None, typer.Option(help="With --verifier: memory in vLLM with so many drafts; default: 7.")
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="With --verifier: memory in vLLM with so many requests at once; default: 16.")
    ] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option(help="With --verifier: memory of one of so many ranks of the verifier; default: 1.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
) -> None:
    """Show what is in a checkpoint, what it needs in memory, and what is wrong with it (then the exit code is 2).

    With --verifier: whether it can draft for that model, by what token ids mean in both (exit code 2: it cannot). With
    --num-speculative-tokens, --max-num-seqs or --tensor-parallel-size also the memory that both need in vLLM.
    """
    check_integer("--num-requests", num_requests, minimum=0)
    check_integer("--context-length", context_length, minimum=0)
    serving: dict[str, Any] = {
        "num_speculative_tokens": num_speculative_tokens,
        "max_num_seqs": max_num_seqs,
        "tensor_parallel_size": tensor_parallel_size,
    }
    given = {name: value for name, value in serving.items() if value is not None}
    if verifier is not None:
        if given:
            given |= {"context_length": context_length, "dtype": dtype, "experts_dtype": experts_dtype}
        _inspect_pair(checkpoint, verifier, revision, given, as_json)
        return
    if given:
        option = "--" + next(iter(given)).replace("_", "-")
        raise ArgumentError(f"{option} is about a verifier in vLLM; name it with --verifier, or leave the option out")
    found = inspect_checkpoint(
        checkpoint,
        revision=revision,
        dtype=dtype,
        experts_dtype=experts_dtype,
        num_requests=num_requests,
        context_length=context_length,
    )
    if as_json:
        print(json.dumps(_as_dict(found)))
    else:
        _show(found, Terminal(highlight=True))
    if found.problems:
        raise typer.Exit(2)


def _inspect_pair(
    checkpoint: str, verifier: str, revision: str | None, serving: Mapping[str, Any], as_json: bool
) -> None:
    """Shows what becomes of both in vLLM; without a word on memory where `serving` is empty."""
    memory = serving_memory(checkpoint, verifier, revision=revision, **serving) if serving else None
    match = compare_with_verifier(checkpoint, verifier, revision=revision)
    if as_json:
        found = {"drafter": checkpoint, "verifier": verifier, **_match_as_dict(match)}
        print(json.dumps({**found, "memory": memory.as_dict()} if memory else found))
    else:
        console = Terminal(highlight=True)
        _show_match(match, checkpoint, verifier, console)
        if memory:
            show_serving_memory(memory, console)
    if not match.shares_tokenizer:
        raise typer.Exit(2)


def _match_as_dict(match: VerifierMatch) -> dict[str, object]:
    return {
        "shares_tokenizer": match.shares_tokenizer,
        "drafter_ids": match.drafter_rows,
        "verifier_ids": match.verifier_rows,
        "shared_ids": match.vocabulary.num_shared_ids,
        "compared_ids": match.vocabulary.num_compared,
        "differences": [
            {"token_id": one.token_id, "verifier": one.target, "drafter": one.drafter}
            for one in match.vocabulary.differences
        ],
    }


def _show_match(match: VerifierMatch, drafter: str, verifier: str, console: Terminal) -> None:
    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, soft_wrap=True, highlight=False)

    vocabulary = match.vocabulary
    say(f"drafter   {drafter}: {match.drafter_rows} ids")
    say(f"verifier  {verifier}: {match.verifier_rows} ids")
    if match.shares_tokenizer:
        shared = f"{vocabulary.num_shared_ids} ids are shared"
        say(f"{shared}; the {vocabulary.num_compared} that both tokenizers name mean the same", "green")
        return
    differing = len(vocabulary.differences)
    if differing:
        say(f"{differing} of {vocabulary.num_compared} ids mean different tokens", "bold red")
        table = Table("id", "verifier", "drafter")
        for one in vocabulary.differences[:SHOWN_DIFFERENCES]:
            table.add_row(str(one.token_id), repr(one.target), repr(one.drafter))
        console.print(table)
    else:
        say("no id has a token in both tokenizers", "bold red")
    if differing > SHOWN_DIFFERENCES:
        say(f"and {differing - SHOWN_DIFFERENCES} more; --json lists all")
    say("a drafter must share the verifier's tokenizer; train one with `twotower-spec train all --verifier DIR`")


def _as_dict(found: Inspection) -> dict[str, object]:
    memory = None
    if found.memory:
        memory = {
            **asdict(found.memory),
            "context_device": found.memory.context_device,
            "denoiser_device": found.memory.denoiser_device,
        }
    return {
        "directory": str(found.directory),
        # Infinity, which config.json may hold, is no JSON: it becomes a string.
        "config": json.loads(found.config.to_json(), parse_constant=str) if found.config else None,
        "parts": {name: asdict(part) for name, part in found.parts.items()},
        "memory": memory,
        "problems": found.problems,
    }


def _show(found: Inspection, console: Terminal) -> None:
    console.print(str(found.directory), style="bold", soft_wrap=True)
    if found.config:
        table = Table("field", "value", title="configuration", title_justify="left")
        for name, value in found.config.to_dict().items():
            table.add_row(name, json.dumps(value))
        console.print(table)
    if found.parts:
        console.print(_parts_table(found.parts))
    if found.memory:
        console.print(_memory_table(found.memory))
    if found.problems:
        console.print(f"{len(found.problems)} problems", style="bold red")
        for problem in found.problems[:SHOWN_PROBLEMS]:
            console.print(f"  {problem}", soft_wrap=True, highlight=False)
        if len(found.problems) > SHOWN_PROBLEMS:
            console.print(f"  and {len(found.problems) - SHOWN_PROBLEMS} more; --json lists all", highlight=False)
    else:
        console.print("nothing wrong: config.json and tensors agree", style="green")


def _parts_table(parts: dict[str, PartSummary]) -> Table:
    table = Table("tower", "tensors", "parameters", "bytes", "dtypes", title="stored tensors", title_justify="left")
    for name, part in parts.items():
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in part.dtypes.items())
        table.add_row(name, str(part.num_tensors), f"{part.num_parameters:,}", byte_text(part.num_bytes), dtypes)
    return table


def _memory_table(memory: MemoryEstimate) -> Table:
    experts = f", experts in {memory.experts_dtype}" if memory.experts_dtype else ""
    title = f"memory in {memory.dtype}{experts}: {memory.num_requests} requests of {memory.context_length} tokens"
    table = Table("device of", "weights", "per request", "together", title=title, title_justify="left")
    table.add_row(
        "context tower",
        byte_text(memory.context_weights),
        byte_text(memory.state_per_request),
        byte_text(memory.context_device),
    )
    table.add_row(
        "denoiser tower",
        byte_text(memory.denoiser_weights),
        byte_text(memory.block_context_per_request),
        byte_text(memory.denoiser_device),
    )
    table.add_section()
    table.add_row("both", "", "", byte_text(memory.context_device + memory.denoiser_device))
    return table
