"""Systems that are measured beside each other: no speculation, TwoTower, and its rivals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

from twotower_bench.cli.options import Models, as_object
from twotower_bench.records import BASELINE, BASELINE_AGAIN, System
from twotower_bench.systems import MTP, NGRAM, NO_SPECULATION, NO_SPECULATION_AGAIN, SUFFIX, draft_model, two_tower
from twotower_spec.config import read_config
from twotower_spec.errors import ArgumentError
from twotower_spec.evaluation.statistics import FEWEST_ROUNDS

# Names that no rival can have.
TAKEN = (BASELINE, BASELINE_AGAIN, "twotower")


def systems_of(
    models: Models, speculative_config: str | None, named: Sequence[str] | None, only: str | None, num_repeats: int
) -> tuple[System, ...]:
    """No speculation, twice where there are enough repeats for a verdict, and all that is measured beside it.

    That is n-gram lookup, suffix decoding where its package is there, a draft model if there is one, the user's own,
    and TwoTower.

    Args:
        models: with or without a draft model.
        speculative_config: the user's over ours, for TwoTower; JSON.
        named: `NAME=JSON` each, a speculative configuration of vLLM.
        only: names with commas of those beside no speculation; None for all.
        num_repeats: passes over everything.
    """
    own = two_tower(models.drafter)
    config = {**(own.speculative_config or {}), **as_object("--speculative-config", speculative_config)}
    found = [*_rivals(models, named), replace(own, speculative_config=config)]
    names = [system.name for system in found]
    wanted = names if only is None else [name.strip() for name in only.split(",")]
    for name in wanted:
        if name not in names:
            raise ArgumentError(f"--only {name} is not there; give some of {', '.join(names)}")
    return (*baselines(num_repeats), *(system for system in found if system.name in wanted))


def baselines(num_repeats: int) -> tuple[System, ...]:
    """No speculation, and once more (A/A) where there are enough repeats for a verdict."""
    return (NO_SPECULATION, NO_SPECULATION_AGAIN) if num_repeats >= FEWEST_ROUNDS else (NO_SPECULATION,)


def _rivals(models: Models, named: Sequence[str] | None) -> list[System]:
    found = [NGRAM, *([SUFFIX] if find_spec("arctic_inference") else [])]
    if models.draft_model:
        found.append(draft_model(models.draft_model))
    for text in named or ():
        rival = MTP if text == MTP.name else _named(text)
        if rival.name in TAKEN or rival.name in (system.name for system in found):
            raise ArgumentError(f"--rival {rival.name} is taken by a system that is measured anyway; give another name")
        _check_mtp(rival, models.verifier)
        found.append(rival)
    return found


def _named(text: str) -> System:
    """A rival from `NAME=JSON`."""
    name, separator, config = text.partition("=")
    if not separator or not name.isidentifier():
        raise ArgumentError(
            f'--rival {text!r} has no name; give NAME=JSON, like eagle={{"method": "eagle", ...}}, or mtp for the '
            f"verifier's own layers"
        )
    return System(name, name, as_object(f"--rival {name}", config))


def _check_mtp(rival: System, verifier: str) -> None:
    """Refuses MTP of a verifier whose config.json counts no layers for it."""
    config = rival.speculative_config or {}
    if not str(config.get("method")).endswith("mtp") or config.get("model"):
        return
    raw = read_config(verifier)
    sections = [raw, *(part for part in raw.values() if isinstance(part, dict))]
    counts = [value for part in sections for name, value in part.items() if "nextn" in name or "mtp" in name]
    if not any(isinstance(count, int) and count > 0 for count in counts):
        raise ArgumentError(
            f"--rival {rival.name} is MTP, and {verifier} has no layers for it (num_nextn_predict_layers in its "
            f"config.json); leave it out, or name a checkpoint that has them as its model"
        )
