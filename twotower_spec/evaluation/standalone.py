"""The model on its own: what each setting of mask diffusion gains in speed over AR, and what it costs in text.

A cell is one setting in one repeat over all prompts, one prompt at a time and greedy.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from twotower_spec.evaluation.lm_eval_model import TaskScore
from twotower_spec.evaluation.statistics import Estimate, bootstrap_interval, median_and_spread
from twotower_spec.generation.options import Mode, ModeOptions
from twotower_spec.generation.self_speculative import agreeing
from twotower_spec.model import TwoTowerModel

AR = ModeOptions(Mode.AR)
# AR; what two towers cost apart from diffusion; the same text as AR, drafted by the denoiser.
BASELINES = (AR, ModeOptions(Mode.MOCK_AR), ModeOptions(Mode.SELF_SPECULATIVE))

WARM_UP_TOKENS = 32
PHASES = ("prefill", "denoise", "extend")


@dataclass(frozen=True)
class Cell:
    """One setting in one repeat.

    Attributes:
        setting: how text was generated.
        repeat: counts from 0.
        seconds: per prompt, from prompt to text.
        token_ids: new tokens per prompt, up to the end of the document, its token included. What a last block holds
            beyond is not counted as text.
        num_denoiser_passes: denoiser passes (NFE) per prompt.
        num_context_passes: context passes per prompt, the prompt counted as one.
        phase_seconds: of all prompts together: prefill, denoise, extend.
    """

    setting: ModeOptions
    repeat: int
    seconds: list[float]
    token_ids: list[list[int]]
    num_denoiser_passes: list[int]
    num_context_passes: list[int]
    phase_seconds: dict[str, float]

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts."""
        return sum(map(len, self.token_ids))

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all texts per second."""
        return self.num_tokens / sum(self.seconds)


@dataclass(frozen=True)
class Score:
    """Score of one setting on a task of lm-eval.

    Attributes:
        setting: how text was generated.
        score: what it reached.
        task: JSON that is equal where scores are comparable.
    """

    setting: ModeOptions
    score: TaskScore
    task: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """Speed and fidelity of one setting, from its cells.

    Attributes:
        setting: how text was generated.
        tokens_per_s: over the repeats.
        speed_up: over AR in the same repeat, the median of all repeats.
        tokens_per_nfe: with an interval over prompts; None without denoiser passes.
        tokens_per_context_pass: likewise.
        identical: fraction of the prompts whose text is AR's to the token, with an interval over prompts.
        common_prefix: mean number of leading tokens that are AR's, with an interval over prompts.
        length: mean tokens per text.
    """

    setting: ModeOptions
    tokens_per_s: Estimate
    speed_up: float
    tokens_per_nfe: Estimate | None
    tokens_per_context_pass: Estimate
    identical: Estimate
    common_prefix: Estimate
    length: float


def sweep(
    confidence_thresholds: Iterable[float], block_sizes: Iterable[int], steps_per_block: Iterable[int]
) -> list[ModeOptions]:
    """The baselines and all combinations for mask diffusion, without those that are the same but for idle steps.

    Raises:
        ArgumentError: a value is out of range.
    """
    thresholds, steps = list(confidence_thresholds), list(steps_per_block)
    combinations = [
        ModeOptions(Mode.MASK_DIFFUSION, size, most, threshold).without_idle_steps()
        for size in block_sizes
        for most in steps
        for threshold in thresholds
    ]
    return list(dict.fromkeys([*BASELINES, *combinations]))


def warm_up(towers: TwoTowerModel, setting: ModeOptions, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Generates a short text that is not measured: the first one of a setting pays for memory and kernels."""
    towers.generate([prompts[0]], setting.complete(max_new_tokens=min(max_new_tokens, WARM_UP_TOKENS)))


def measure(
    towers: TwoTowerModel,
    setting: ModeOptions,
    repeat: int,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
) -> Cell:
    """Measures one setting in one repeat.

    Args:
        towers: the model.
        setting: how text is generated.
        repeat: number of the repeat, for the record.
        prompts: token ids.
        max_new_tokens: most new tokens per prompt.
        eos_token_ids: ids that end a document.
    """
    seconds, results = [], []
    options = setting.complete(max_new_tokens=max_new_tokens, eos_token_id=eos_token_ids)
    for prompt in prompts:
        start = time.perf_counter()
        # Tokens are on the host when this returns, so nothing is left running on a GPU.
        results.append(towers.generate([prompt], options))
        seconds.append(time.perf_counter() - start)

    def up_to_end(tokens: list[int]) -> list[int]:
        return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in eos_token_ids), tokens)

    return Cell(
        setting,
        repeat,
        seconds,
        token_ids=[up_to_end(one.token_ids[0]) for one in results],
        num_denoiser_passes=[one.num_denoiser_passes[0] for one in results],
        num_context_passes=[one.num_context_passes[0] for one in results],
        phase_seconds={name: sum(getattr(one.times, f"{name}_s") for one in results) for name in PHASES},
    )


def summarise(cells: Iterable[Cell]) -> list[Summary]:
    """Summarises every setting, in the order of first cells, from the repeats in which AR was measured, too.

    Texts are those of the first repeat: greedy text does not change from one to the next.
    """
    by_setting: dict[ModeOptions, dict[int, Cell]] = defaultdict(dict)
    for cell in cells:
        by_setting[cell.setting][cell.repeat] = cell
    baseline = by_setting.get(AR, {})
    summaries = []
    for setting, repeats in by_setting.items():
        common = sorted(repeats.keys() & baseline.keys())
        if common:
            summaries.append(_summary(setting, [repeats[i] for i in common], [baseline[i] for i in common]))
    return summaries


def _summary(setting: ModeOptions, cells: Sequence[Cell], baseline: Sequence[Cell]) -> Summary:
    """Summarises one setting from its cells and those of AR in the same repeats."""
    texts, expected = cells[0].token_ids, baseline[0].token_ids
    lengths = [float(len(text)) for text in texts]
    # A text that ends with its first token may take no denoiser pass.
    passes = [(length, count) for length, count in zip(lengths, cells[0].num_denoiser_passes, strict=True) if count]
    pairs = list(zip(texts, expected, strict=True))
    return Summary(
        setting=setting,
        tokens_per_s=median_and_spread([cell.tokens_per_s for cell in cells]),
        speed_up=statistics.median(one.tokens_per_s / ar.tokens_per_s for one, ar in zip(cells, baseline, strict=True)),
        tokens_per_nfe=bootstrap_interval(*zip(*passes, strict=True)) if passes else None,
        tokens_per_context_pass=bootstrap_interval(lengths, cells[0].num_context_passes),
        identical=bootstrap_interval([float(text == other) for text, other in pairs]),
        common_prefix=bootstrap_interval([float(agreeing(text, other)) for text, other in pairs]),
        length=statistics.fmean(lengths),
    )
