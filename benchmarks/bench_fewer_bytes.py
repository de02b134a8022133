"""Acceptance lost beside bytes saved, on the bundled trio: python -m benchmarks.bench_fewer_bytes

The verifier's greedy text for held-out prompts is fixed first, and every drafter walks over it in blocks with one
denoising step. Acceptance is the trio's; bytes are those of a round of the published model, by arithmetic, with as many
experts per token less in proportion.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from twotower_bench.drafter_size import PUBLISHED_SIZE, weight_bytes_of_pass
from twotower_spec.demo import held_out_prompts, trio_directory
from twotower_spec.demo.trio import CATEGORIES, trio_path
from twotower_spec.drafting import FixedPolicy
from twotower_spec.evaluation.statistics import Estimate
from twotower_spec.files import write_atomically
from twotower_spec.machine import describe_machine
from twotower_spec.model import TwoTowerModel
from twotower_spec.towers.layers import MixtureOfExperts
from twotower_spec.training.evaluation import Trio
from twotower_spec.training.quality import Acceptance, TowerDrafter, VerifierText, measure_acceptance, write_texts

WHOLE_BLOCK = 16
BATCH_SIZES = (1, 8)
NUM_RESAMPLES = 4000
MARKERS = "osD^vX<>P*hd"
# Dtypes of experts in the table of arithmetic; those of 8 bits differ by nothing that it shows.
HELD = {None: "bf16", "int8": "8 bits", "int4": "4 bits"}


@dataclass(frozen=True)
class Way:
    """A way to draft from fewer bytes.

    Attributes:
        name: as printed.
        block_size: positions that are denoised, in one step.
        dtype: that is computed in; weights are bfloat16 in any case.
        experts_dtype: of both towers; None for bfloat16.
        denoiser_experts, context_experts: share of the experts of a token that it visits.
    """

    name: str
    block_size: int = WHOLE_BLOCK
    dtype: str = "float32"
    experts_dtype: str | None = None
    denoiser_experts: float = 1.0
    context_experts: float = 1.0

    def towers(self) -> TwoTowerModel:
        """The trio's towers, drafting so."""
        model = TwoTowerModel.from_pretrained(
            trio_path("twotower"), dtype=self.dtype, experts_dtype=self.experts_dtype, progress=False
        )
        for tower, share in ((model.context, self.context_experts), (model.denoiser, self.denoiser_experts)):
            for layer in tower.layers:
                if isinstance(mixer := getattr(layer, "mixer", None), MixtureOfExperts):
                    mixer.choice = replace(mixer.choice, top_k=round(share * mixer.choice.top_k))
        return model

    def bytes_of_round(self, batch_size: int, acceptance_length: float) -> float:
        """Bytes of weights of a round of the published model: the context's pass over what it gains, and one step."""
        total = 0.0
        passes = ((self.context_experts, acceptance_length), (self.denoiser_experts, self.block_size))
        for share, num_tokens in passes:
            config = PUBLISHED_SIZE.with_experts_dtype(self.experts_dtype)
            config = config.with_experts_per_token(round(share * config.num_experts_per_tok))
            total += weight_bytes_of_pass(config, batch_size * num_tokens, with_head=True, itemsize=2)
        return total


WAYS = (
    Way("as published"),
    Way("A/A: computed in bfloat16", dtype="bfloat16"),
    Way("experts in int8", experts_dtype="int8"),
    Way("experts in float8_e4m3fn", experts_dtype="float8_e4m3fn"),
    Way("experts in int4", experts_dtype="int4"),
    Way("half the experts, denoiser", denoiser_experts=0.5),
    Way("half the experts, context tower", context_experts=0.5),
    Way("half the experts, both towers", denoiser_experts=0.5, context_experts=0.5),
    Way("int8, half the experts, denoiser", experts_dtype="int8", denoiser_experts=0.5),
    Way("int4, half the experts, denoiser", experts_dtype="int4", denoiser_experts=0.5),
    Way("block of 8", block_size=8),
    Way("block of 4", block_size=4),
    Way("block of 8, int8", block_size=8, experts_dtype="int8"),
    Way("block of 8, int4", block_size=8, experts_dtype="int4"),
)


def walk(towers: TwoTowerModel, texts: Sequence[VerifierText], block_size: int) -> Acceptance:
    longest = max(len(text.token_ids) for text in texts) + WHOLE_BLOCK
    drafter = TowerDrafter(towers, len(texts), longest, FixedPolicy(block_size, 1), "context")
    return measure_acceptance(drafter, texts, block_size)


def change(found: Sequence[Acceptance], others: Sequence[Acceptance], is_paired: bool) -> Estimate:
    """Acceptance length of `found` over that of `others`, minus 1; of the same texts drawn again together if paired."""
    generator, ratios = np.random.default_rng(0), []
    for resample in range(NUM_RESAMPLES + 1):
        lengths = []
        drawn = [_drawn(one, generator if resample else None) for one in found]
        for side in (found, others):
            rows = (
                drawn if is_paired or side is found else [_drawn(one, generator if resample else None) for one in side]
            )
            tokens = sum(np.take(one.tokens, row).sum() for one, row in zip(side, rows, strict=True))
            steps = sum(np.take(one.verify_steps, row).sum() for one, row in zip(side, rows, strict=True))
            lengths.append(tokens / steps)
        ratios.append(float(lengths[0] / lengths[1] - 1))
    low, high = np.quantile(ratios[1:], (0.025, 0.975))
    return Estimate(ratios[0], float(low), float(high))


def _drawn(one: Acceptance, generator: np.random.Generator | None) -> Any:
    count = len(one.tokens)
    return np.arange(count) if generator is None else generator.integers(count, size=count)


def length_of(found: Sequence[Acceptance]) -> float:
    """Acceptance length over all texts."""
    return sum(sum(one.tokens) for one in found) / sum(sum(one.verify_steps) for one in found)


def rows(texts: Sequence[Sequence[VerifierText]]) -> Iterator[dict[str, Any]]:
    """A row for every way: acceptance by category and of all, its change, and bytes saved."""
    base: list[Acceptance] = []
    for way in WAYS:
        towers = way.towers()
        found = [walk(towers, category, way.block_size) for category in texts]
        base = base or found
        length, whole = length_of(found), length_of(base)
        yield {
            **asdict(way),
            "by_category": {name: one.length for name, one in zip(CATEGORIES, found, strict=True)},
            "length": length,
            "change": asdict(change(found, base, is_paired=True)),
            "bytes": {size: way.bytes_of_round(size, length) for size in BATCH_SIZES},
            "saved": {
                size: 1 - way.bytes_of_round(size, length) / WAYS[0].bytes_of_round(size, whole) for size in BATCH_SIZES
            },
        }


def arithmetic() -> Table:
    """Bytes of a round of the published model that gains 4 tokens, by experts per token of the denoiser."""
    title = "GB of a round: a context pass over 4 tokens, one denoising step"
    sizes = [(16, 1), (8, 1), (4, 1), (16, 8)]
    names = [f"S {size}, {held}, {batch} at once" for held in HELD.values() for size, batch in sizes]
    table = Table("experts per token", *names, title=title)
    for count in range(PUBLISHED_SIZE.num_experts_per_tok, 0, -1):
        share = count / PUBLISHED_SIZE.num_experts_per_tok
        found = [
            Way("", size, experts_dtype=held, denoiser_experts=share).bytes_of_round(batch, 4)
            for held in HELD
            for size, batch in sizes
        ]
        table.add_row(str(count), *(f"{one / 1e9:.1f}" for one in found))
    return table


def draw(found: Sequence[dict[str, Any]], file: Path) -> None:
    """Draws acceptance lost (above 1 % by its logarithm) against bytes saved at batch 1, with the A/A band."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    _, again, *others = found
    axes.axhspan(-100 * again["change"]["high"], -100 * again["change"]["low"], color="0.88", label=again["name"])
    for number, one in enumerate(others):
        lost, high, low = (-100 * one["change"][name] for name in ("value", "low", "high"))
        axes.errorbar(
            100 * one["saved"][1],
            lost,
            yerr=[[lost - low], [high - lost]],
            fmt=MARKERS[number],
            color=f"C{number}",
            capsize=3,
            label=one["name"],
        )
    axes.set_yscale("symlog", linthresh=1)
    axes.set_yticks([0, 0.5, 1, 2, 5, 10, 20], ["0", "0.5", "1", "2", "5", "10", "20"])
    axes.set_xlabel("bytes of a round saved, % (published model, 1 request)")
    axes.set_ylabel("acceptance length lost, % (bundled trio)")
    axes.set_xlim(0, 100)
    figure.legend(frameon=False, loc="outside right center")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fewer bytes"}):
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def main(
    prompts: Annotated[int, typer.Option(help="Prompts per category.")] = 72,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    chart: Annotated[Path | None, typer.Option(help="Draw the chart here, by its ending.")] = None,
) -> None:
    """Measures what drafts lose by fewer bytes."""
    torch.set_num_threads(1)
    trio, texts = Trio(trio_directory()), []
    for category in CATEGORIES:
        every = held_out_prompts(category)
        chosen = [row.prompt for row in every[:: max(1, len(every) // prompts)][:prompts]]
        encoded = [list(ids) for ids in trio.tokenizer(chosen)["input_ids"]]
        texts.append(write_texts(trio.verifier, encoded, 128, 0.0, trio.end_token_ids))
    halves = [[walk(trio.towers, category[half::2], WHOLE_BLOCK) for category in texts] for half in (0, 1)]
    noise = change(halves[0], halves[1], is_paired=False)
    console, table = Console(), Table("way", *CATEGORIES, "all", "change, %", "GB, 1 request", "GB, 8 requests")
    found = []
    for one in rows(texts):
        found.append(one)
        lost = Estimate(*(100 * one["change"][name] for name in ("value", "low", "high")))
        sizes = [f"{one['bytes'][size] / 1e9:.1f} ({100 * one['saved'][size]:.0f} %)" for size in BATCH_SIZES]
        lengths = [*one["by_category"].values(), one["length"]]
        table.add_row(one["name"], *(f"{length:.2f}" for length in lengths), str(lost), *sizes)
        console.print(one["name"], f"{one['length']:.3f}")
    console.print(table)
    console.print(arithmetic())
    console.print(f"A/A, one half of the prompts over the other: {100 * noise.value:.1f} %, {100 * noise.low:.1f} to")
    console.print(f"{100 * noise.high:.1f} %; {sum(map(len, texts))} prompts")
    if json_file:
        figures = {"machine": describe_machine(), "prompts": prompts, "noise": asdict(noise), "ways": found}
        write_atomically(json_file, json.dumps(figures, indent=1) + "\n")
    if chart:
        draw(found, chart)


if __name__ == "__main__":
    typer.run(main)
