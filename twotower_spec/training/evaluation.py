"""Evaluation of a trio on held-out prompts: acceptance length of the towers and their rivals, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from twotower_spec.checkpoint import encode_texts, end_token_ids, load_tokenizer
from twotower_spec.drafting import DraftPolicy, FixedPolicy, ThresholdPolicy
from twotower_spec.drafting.block_drafter import FirstToken
from twotower_spec.errors import ArgumentError
from twotower_spec.model import TwoTowerModel
from twotower_spec.reading import is_file
from twotower_spec.training.processes import sharing_cores
from twotower_spec.training.quality import (
    ContextTowerDrafter,
    Drafter,
    ModelDrafter,
    NgramDrafter,
    TowerDrafter,
    VerifierText,
    measure_acceptance,
    repeated_4gram_fraction,
    write_texts,
)
from twotower_spec.training.stages import load_verifier

if TYPE_CHECKING:  # transformers' models take seconds to import
    from transformers import PreTrainedModel

TEMPERATURES = (0.0, 0.7)
GAMMA, MOST_STEPS = 0.8, 16


@dataclass(frozen=True)
class EvaluationRow:
    """Measurements of one system on one category.

    Attributes:
        system: name of the drafter, its settings included.
        category: of the prompts.
        temperature: of the verifier's text.
        num_tokens: drafts per verify step, K.
        acceptance_length: tokens per verify step.
        low, high: its 95 % bootstrap interval over prompts.
        num_prompts, num_verify_steps: what it was measured on.
        passes_per_step: denoiser passes per verify step.
        by_position: share of verify steps that accepted each position.
    """

    system: str
    category: str
    temperature: float
    num_tokens: int
    acceptance_length: float
    low: float
    high: float
    num_prompts: int
    num_verify_steps: int
    passes_per_step: float
    by_position: list[float]

    def to_json(self) -> dict[str, Any]:
        """Converts the row to a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class System:
    """Drafter with fixed settings, to be compared with others.

    Attributes:
        name: as printed.
        num_tokens: K.
        make: a new drafter for a walk over texts.
    """

    name: str
    num_tokens: int
    make: Callable[[Sequence[VerifierText]], Drafter]


class Trio:
    """Verifier, towers and draft model of a folder, computed in float32."""

    def __init__(self, directory: Path, verifier: Path | None = None, device: torch.device | str = "cpu") -> None:
        """Loads the models; the draft model may be missing.

        Raises:
            ArgumentError: there is no verifier, or no TwoTower checkpoint with a tokenizer, in the folder.
        """
        for name, path in (("verifier", verifier or directory / "verifier"), ("twotower", directory / "twotower")):
            if not is_file(path / "config.json"):
                raise ArgumentError(f"there is no {name} in {path}; give the folder of a finished training")
        where = torch.device(device)
        tokenizer = load_tokenizer(directory / "twotower")
        if tokenizer is None or tokenizer.eos_token_id is None:
            raise ArgumentError(
                f"{directory / 'twotower'} has no tokenizer with an end-of-sequence token; copy it there"
            )
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self.verifier = load_verifier(verifier or directory / "verifier", where)
        vocab_size = int(self.verifier.config.get_text_config().vocab_size)
        self.end_token_ids = end_token_ids(verifier or directory / "verifier", tokenizer, vocab_size)
        self.towers = TwoTowerModel.from_pretrained(
            directory / "twotower", dtype=torch.float32, context_device=where, progress=False
        )
        self.draft: PreTrainedModel | None = None
        if (directory / "draft" / "config.json").is_file():
            self.draft = load_verifier(directory / "draft", where)

    def systems(self) -> Iterator[System]:
        """Yields the drafters that are compared."""
        one_step = FixedPolicy(8, 1, num_tokens=7)
        gamma = ThresholdPolicy(16, MOST_STEPS, GAMMA, num_tokens=15)
        yield self._towers("TwoTower, 1 step, first token from context", one_step, "context")
        yield self._towers("TwoTower, 1 step", one_step, "denoiser")
        yield self._towers("TwoTower, gamma 0.8, first token from context", gamma, "context")
        yield self._towers("TwoTower, gamma 0.8", gamma, "denoiser")
        for num_tokens in (7, 15):
            yield System("n-gram lookup", num_tokens, lambda _: NgramDrafter())
        if self.draft is not None:
            model = self.draft
            for num_tokens in (4, 7, 15):
                yield System("AR draft model", num_tokens, lambda _: ModelDrafter(model))
        for num_tokens in (4, 7, 15):
            yield System(
                "context tower, autoregressive",
                num_tokens,
                lambda texts: ContextTowerDrafter(self.towers, *_room(texts)),
            )

    def _towers(self, name: str, policy: DraftPolicy, first_token: FirstToken) -> System:
        return System(
            name,
            policy.num_speculative_tokens,
            lambda texts: TowerDrafter(self.towers, *_room(texts), policy, first_token),
        )


def _room(texts: Sequence[VerifierText]) -> tuple[int, int]:
    """Size of the context state for a walk over texts: rows, and tokens with provisional drafts included."""
    return len(texts), max(len(text.token_ids) for text in texts) + 16


@dataclass(frozen=True)
class TrioFiles:
    """Paths of a trio, from which any process can load it.

    Attributes:
        directory: folder of a finished training.
        verifier: directory of a verifier elsewhere, or None.
        device: where the models run.
    """

    directory: Path
    verifier: Path | None
    device: torch.device

    def load(self) -> Trio:
        """Loads the models."""
        return Trio(self.directory, self.verifier, self.device)


def evaluate_side_by_side(
    files: TrioFiles,
    prompts: Mapping[str, Sequence[str]],
    max_new_tokens: int,
    num_processes: int,
    report: Callable[[EvaluationRow], None] = lambda row: None,
) -> dict[str, Any]:
    """Runs `evaluate` with the categories side by side, in processes that share the cores.

    Args:
        files: the models.
        prompts, max_new_tokens, report: as `evaluate`.
        num_processes: most processes at a time.
    """
    workers = min(num_processes, len(prompts))
    if workers == 1:
        return evaluate(files.load(), prompts, max_new_tokens, report=report)
    results: dict[str, dict[str, Any]] = {}
    with sharing_cores(workers) as pool:
        jobs = {
            pool.submit(_evaluate_category, files, category, list(texts), max_new_tokens): category
            for category, texts in prompts.items()
        }
        for job in as_completed(jobs):
            results[jobs[job]] = job.result()
            for row in job.result()["rows"]:
                report(EvaluationRow(**row))
    merged: dict[str, Any] = {"rows": [], "repeated_4gram_fraction": {}, "characters_per_token": {}}
    for category in prompts:
        merged["rows"] += results[category]["rows"]
        for figure in ("repeated_4gram_fraction", "characters_per_token"):
            merged[figure] |= results[category][figure]
    return merged


def _evaluate_category(files: TrioFiles, category: str, prompts: list[str], max_new_tokens: int) -> dict[str, Any]:
    return evaluate(files.load(), {category: prompts}, max_new_tokens)


def evaluate(
    trio: Trio,
    prompts: Mapping[str, Sequence[str]],
    max_new_tokens: int,
    temperatures: Sequence[float] = TEMPERATURES,
    report: Callable[[EvaluationRow], None] = lambda row: None,
) -> dict[str, Any]:
    """Measures every system on every category.

    Args:
        trio: the models.
        prompts: by category.
        max_new_tokens: length of the verifier's text.
        temperatures: of the verifier's text, 0 for greedy.
        report: called with every row as it is known.

    Returns:
        `rows`; by category `repeated_4gram_fraction` of the greedy text, and `characters_per_token` of the prompts.
    """
    rows: list[EvaluationRow] = []
    repeated: dict[str, float] = {}
    density: dict[str, float] = {}
    for category, texts_of_category in prompts.items():
        encoded = encode_texts(trio.tokenizer, texts_of_category)
        if not encoded or not all(encoded):
            raise ArgumentError(f"category {category} has no prompt, or one without tokens; give text")
        density[category] = sum(map(len, texts_of_category)) / sum(map(len, encoded))
        for temperature in temperatures:
            texts = write_texts(trio.verifier, encoded, max_new_tokens, temperature, trio.end_token_ids)
            if temperature == 0:
                repeated[category] = repeated_4gram_fraction(texts)
            for system in trio.systems():
                result = measure_acceptance(system.make(texts), texts, system.num_tokens)
                low, high = result.interval()
                row = EvaluationRow(
                    system=system.name,
                    category=category,
                    temperature=temperature,
                    num_tokens=system.num_tokens,
                    acceptance_length=result.length,
                    low=low,
                    high=high,
                    num_prompts=len(result.tokens),
                    num_verify_steps=sum(result.verify_steps),
                    passes_per_step=result.num_denoiser_passes / max(1, sum(result.verify_steps)),
                    by_position=result.by_position,
                )
                rows.append(row)
                report(row)
    return {
        "rows": [row.to_json() for row in rows],
        "repeated_4gram_fraction": repeated,
        "characters_per_token": density,
    }
