"""Fixed ways to draft beside the adaptive policy, on the bundled trio: python -m benchmarks.bench_drafting

The verifier's greedy text for held-out prompts is fixed first, and every setting walks over it. The cost of a round is
read from one table of medians, measured at batch 1 before the walks, so that the noise of the machine is the same for
all settings. Then the winners run for real, in turn.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from twotower_spec.demo import held_out_prompts, trio_directory
from twotower_spec.drafting import (
    AdaptivePolicy,
    DraftingSession,
    DraftPolicy,
    DraftRequest,
    FixedPolicy,
    RoundResult,
    ThresholdPolicy,
    speculative_loop,
)
from twotower_spec.drafting.block_drafter import FirstToken
from twotower_spec.drafting.verifier import Verifier
from twotower_spec.files import write_atomically
from twotower_spec.generation.self_speculative import agreeing
from twotower_spec.machine import describe_machine
from twotower_spec.training.evaluation import Trio
from twotower_spec.training.quality import VerifierText, write_texts

GAMMAS = (0.5, 0.8, 0.95)
STEPS = (1, 2, 4, 8, 16)
BLOCK_SIZES = (4, 8, 16)
REPEATS = 15


@dataclass(frozen=True)
class DraftSetting:
    """One fixed way to draft."""

    block_size: int
    steps: int
    gamma: float
    first_token: FirstToken

    @property
    def name(self) -> str:
        gamma = "" if self.steps == 1 else f" gamma {self.gamma}"
        first = " first from context" if self.first_token == "context" else ""
        return f"S {self.block_size}, {self.steps} steps{gamma}{first}"

    def policy(self) -> ThresholdPolicy:
        return ThresholdPolicy(self.block_size, self.steps, self.gamma)


def draft_settings() -> Iterator[DraftSetting]:
    for size, steps, gamma, first in itertools.product(BLOCK_SIZES, STEPS, GAMMAS, ("context", "denoiser")):
        if steps <= size and (steps > 1 or gamma == GAMMAS[0]):
            yield DraftSetting(size, steps, gamma, first)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Costs:
    """Milliseconds at batch 1, as points of lines.

    Attributes:
        verify, extend: by number of tokens.
        block, step: by block size: cost of a block without its steps, and of each step.
    """

    verify: dict[int, float]
    extend: dict[int, float]
    block: dict[int, float]
    step: dict[int, float]

    def round_ms(self, size: int, passes: int, num_drafts: int, num_new: int) -> tuple[float, float, float]:
        """Time of a round (extend, denoise, verify) after one that brought `num_new` tokens."""
        denoise = self.block[size] + passes * self.step[size] if size else 0.0
        return on_line(self.extend, num_new) if size else 0.0, denoise, on_line(self.verify, 1 + num_drafts)


def on_line(points: dict[int, float], at: float) -> float:
    return float(np.interp(at, list(points), list(points.values())))


def median_ms(work: Callable[[], object]) -> float:
    for _ in range(3):
        work()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def measure_costs(trio: Trio, text: list[int]) -> Costs:
    target = Verifier(trio.verifier, [text])
    target.read([text[-1:]])
    target.keep([1], [text[-1:]])

    def verify(count: int) -> None:
        target.read([text[:count]])
        target.keep([0], [text[:count]])

    verify_ms = {n: median_ms(lambda n=n: verify(n)) for n in (1, 2, 5, 9, 17)}  # type: ignore[misc]
    session = DraftingSession(trio.towers, FixedPolicy(4, 1), num_slots=1)
    session.draft([DraftRequest(0, text)])

    def extend(count: int) -> None:
        session.state.extend(trio.towers.context, {0: text[:count]}, provisional=True).accept({0: 0})

    extend_ms = {n: median_ms(lambda n=n: extend(n)) for n in (1, 2, 4, 8, 17)}  # type: ignore[misc]
    block, step = {}, {}
    for size in BLOCK_SIZES:
        one, three = (denoise_ms(trio, text, FixedPolicy(size, steps, 1.0)) for steps in (1, 3))
        step[size] = (three - one) / 2
        block[size] = one - step[size]
    return Costs(verify_ms, extend_ms, block, step)


def denoise_ms(trio: Trio, text: list[int], policy: FixedPolicy) -> float:
    session = DraftingSession(trio.towers, policy, num_slots=1)
    request = DraftRequest(0, text)
    session.draft([request])
    return median_ms(lambda: session.draft([request]))


@dataclass
class Tally:
    """Tokens gained and milliseconds spent."""

    tokens: int = 0
    ms: float = 0.0
    rounds: int = 0

    def add(self, tokens: int, phases: Sequence[float]) -> None:
        self.tokens, self.ms, self.rounds = self.tokens + tokens, self.ms + sum(phases), self.rounds + 1

    @property
    def rate(self) -> float:
        return self.tokens / self.ms


def walk(trio: Trio, texts: list[VerifierText], policy: DraftPolicy, first: FirstToken, costs: Costs) -> Tally:
    """Walks over all texts at once, which is the same to policies that do not adapt."""
    longest = max(len(text.token_ids) for text in texts)
    session = DraftingSession(
        trio.towers,
        policy,
        first_token=first,
        num_slots=len(texts),
        num_tokens=len(texts) * (longest + 16),
        token_budget=len(texts) * longest,
    )
    position = {row: len(text.prompt) + 1 for row, text in enumerate(texts) if len(text.text) > 1}
    gained, tally = dict.fromkeys(position, 1), Tally()
    while position:
        left = {row: texts[row].token_ids[end:] for row, end in position.items()}
        requests = [DraftRequest(row, texts[row].token_ids[:end], len(left[row]) - 1) for row, end in position.items()]
        block = session.draft(requests).block
        for i, row in enumerate(left):
            accepted = agreeing(block.row(i), left[row])
            new = min(accepted + 1, len(left[row]))
            passes = block.num_denoiser_passes[i]
            tally.add(new, costs.round_ms(block.block_size, passes, block.num_draft_tokens[i], gained[row]))
            gained[row], position[row] = new, position[row] + new
            if new == len(left[row]):
                del position[row]
    return tally


def walk_adaptively(trio: Trio, texts: list[VerifierText], costs: Costs, policy: AdaptivePolicy) -> Tally:
    """Walks over one text after the other, as served at batch 1; the policy is told the table's costs as measured."""
    session, tally = DraftingSession(trio.towers, policy, num_slots=1), Tally()
    for row, text in enumerate(texts):
        end, gained = len(text.prompt) + 1, 1
        while end < len(text.token_ids):
            left = text.token_ids[end:]
            drafted = session.draft([DraftRequest(row, text.token_ids[:end], len(left) - 1)])
            block = drafted.block
            accepted = agreeing(block.row(0), left)
            phases = costs.round_ms(block.block_size, block.num_denoiser_passes[0], block.num_draft_tokens[0], gained)
            outcome = drafted.outcome(RoundResult([accepted], verify_s=phases[2] / 1000))
            policy.observe(replace(outcome, extend_s=phases[0] / 1000, denoise_s=phases[1] / 1000))
            new = min(accepted + 1, len(left))
            tally.add(new, phases)
            # Tokens of rounds without drafts are read with the next block.
            end, gained = end + new, new if block.block_size else gained + new
        session.release(row)
    return tally


def run_for_real(trio: Trio, prompts: list[list[int]], sessions: dict[str, DraftingSession | None]) -> dict[str, float]:
    """Tokens per second of the real loop, medians of three turns."""
    speeds: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(3):
        for name, session in sessions.items():
            tokens, seconds = 0, 0.0
            for prompt in prompts:
                result = speculative_loop(trio.verifier, session, [prompt], 128, eos_token_id=2)
                tokens, seconds = tokens + len(result.token_ids[0]), seconds + result.total_s
            speeds[name].append(tokens / seconds)
    return {name: statistics.median(values) for name, values in speeds.items()}


def main(
    prompts: Annotated[int, typer.Option(help="Prompts per category.")] = 72,
    real_prompts: Annotated[int, typer.Option(help="Prompts per category of the runs for real.")] = 12,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    trio_folder: Annotated[Path | None, typer.Option("--trio", help="Default: the bundled trio.")] = None,
) -> None:
    """Compares the policies."""
    torch.set_num_threads(1)
    console, trio = Console(), Trio(trio_folder or trio_directory())
    costs: Costs | None = None
    figures: dict[str, object] = {"machine": describe_machine()}
    for category in ("maths", "python", "real"):
        rows = held_out_prompts(category)
        chosen = [row.prompt for row in rows[:: max(1, len(rows) // prompts)][:prompts]]
        encoded = [list(ids) for ids in trio.tokenizer(chosen)["input_ids"]]
        texts = write_texts(trio.verifier, encoded, 128, 0.0, [2])
        costs = costs or measure_costs(trio, texts[0].token_ids)
        tallies = {
            setting: walk(trio, texts, setting.policy(), setting.first_token, costs) for setting in draft_settings()
        }
        ordered = sorted(tallies, key=lambda setting: -tallies[setting].rate)
        best, published = ordered[0], tallies[DraftSetting(16, 16, 0.8, "denoiser")]
        adaptive = walk_adaptively(trio, texts, costs, AdaptivePolicy(BLOCK_SIZES))
        title = f"{category}, {len(texts)} prompts"
        table = Table("setting", "tokens per round", "ms per round", "tokens/ms", title=title)
        shown = {"adaptive": adaptive, **{setting.name: tallies[setting] for setting in ordered}}
        for name, tally in shown.items():
            per_round = (f"{tally.tokens / tally.rounds:.2f}", f"{tally.ms / tally.rounds:.1f}")
            table.add_row(name, *per_round, f"{tally.rate:.4f}")
        console.print(table)
        console.print(f"adaptive: {adaptive.rate / tallies[best].rate:.3f} of the best fixed setting ({best.name}), ")
        console.print(f"{adaptive.rate / published.rate:.2f} times threshold, gamma 0.8, 16 steps")
        speeds = run_for_real(
            trio,
            encoded[:real_prompts],
            {
                "no drafts": None,
                best.name: DraftingSession(trio.towers, best.policy(), first_token=best.first_token),
                "adaptive": DraftingSession(trio.towers, AdaptivePolicy(BLOCK_SIZES)),
                "threshold, gamma 0.8, 16 steps": DraftingSession(
                    trio.towers, ThresholdPolicy(), first_token="denoiser"
                ),
            },
        )
        console.print("tokens/s for real: " + ", ".join(f"{name} {speed:.1f}" for name, speed in speeds.items()))
        figures[category] = {
            "costs_ms": asdict(costs),
            "settings": {name: asdict(tally) | {"rate": tally.rate} for name, tally in shown.items()},
            "tokens_per_s": speeds,
        }
    if json_file:
        write_atomically(json_file, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
