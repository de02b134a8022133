"""Options that the benchmarks in vLLM share, and what is made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import typer
from transformers import AutoTokenizer

from twotower_spec.cli.measurements import numbers
from twotower_spec.config import check_integer
from twotower_spec.demo import trio_path
from twotower_spec.errors import ArgumentError
from twotower_spec.evaluation.serving import System
from twotower_spec.evaluation.serving_figures import BASELINE, BASELINE_AGAIN
from twotower_spec.evaluation.statistics import FEWEST_ROUNDS
from vllm_twotower.systems import (
    NGRAM,
    NO_SPECULATION,
    NO_SPECULATION_AGAIN,
    SUFFIX,
    TRIO_ARGUMENTS,
    draft_model,
    two_tower,
)

Verifier = Annotated[
    str | None, typer.Option(help="The model whose text is kept: a directory or hub id; default: the bundled one.")
]
Drafter = Annotated[str | None, typer.Option(help="TwoTower checkpoint: likewise.")]
Dataset = Annotated[str, typer.Option(help="A named set, a file, or a hub id; see docs/evaluation.md.")]
Category = Annotated[list[str] | None, typer.Option(help="Only prompts of this category; can be repeated.")]
Chat = Annotated[bool, typer.Option("--chat", help="First turns in the verifier's chat template, not plain text.")]
MaxNewTokens = Annotated[int, typer.Option(help="Most new tokens per prompt.")]
EngineArgs = Annotated[
    str | None, typer.Option(help='Arguments of LLM() for all systems, as JSON: {"tensor_parallel_size": 4}.')
]
Engines = Annotated[
    str,
    typer.Option(
        help="together: all at once; in-turn: one at a time, started anew in every repeat; auto: in-turn on a GPU."
    ),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="JSON lines, one per finished cell; a stopped run goes on.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Begin --json anew.")]
ReportFolder = Annotated[
    Path | None, typer.Option("--report", help="Folder for the report of it: HTML, PNG, Markdown, JSON.")
]

Holding = Literal["auto", "together", "in-turn"]

# Names that no rival can have.
TAKEN = (BASELINE, BASELINE_AGAIN, "twotower")
# Large models take their time to load, and a cell may have many prompts.
LONGEST_SILENCE_S = 3600.0


@dataclass(frozen=True)
class Models:
    """What is measured with what.

    Attributes:
        verifier, drafter: directories or hub ids.
        draft_model: an AR draft model; None where there is none.
        arguments: of `LLM()`, the same for all systems.
    """

    verifier: str
    drafter: str
    draft_model: str | None
    arguments: Mapping[str, Any]

    @property
    def identity(self) -> list[Any]:
        """As JSON: what must be the same for measurements to be compared."""
        paths = (str(Path(name).resolve()) if Path(name).is_dir() else name for name in (self.verifier, self.drafter))
        # More requests at once go on with a file.
        return [*paths, {name: value for name, value in self.arguments.items() if name != "max_num_seqs"}]

    @classmethod
    def of(
        cls,
        verifier: str | None,
        drafter: str | None,
        draft_model: str | None,
        engine_args: str | None,
        max_num_seqs: int,
    ) -> Models:
        """The bundled ones where none are named.

        Raises:
            ArgumentError: models of the trio would be measured with others, a path has no model, or the arguments are
                no JSON object.
        """
        for option, model in (("--verifier", verifier), ("--drafter", drafter), ("--draft-model", draft_model)):
            if model is not None:
                _check_path(option, model)
        if (verifier is None) != (drafter is None):
            given, missing = ("--verifier", "--drafter") if verifier else ("--drafter", "--verifier")
            raise ArgumentError(f"{given} came without {missing}; name both, or neither for the bundled trio")
        own = {"max_num_seqs": max_num_seqs, **as_object("--engine-args", engine_args)}
        for name in ("speculative_config", "model", "data_parallel_size"):
            if name in own:
                raise ArgumentError(f"--engine-args cannot have {name}, which differs or must not; leave it out")
        if verifier is None or drafter is None:
            trio = str(trio_path("verifier")), str(trio_path("twotower")), draft_model or str(trio_path("draft"))
            return cls(*trio, {**TRIO_ARGUMENTS, **own})
        return cls(verifier, drafter, draft_model, own)


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

    Raises:
        ArgumentError: JSON that is no object, or a name that is taken or unknown.
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


def held_together(option: str, given: str) -> bool:
    """Whether all engines or servers are held at once.

    Raises:
        ArgumentError: an unknown word.
    """
    if given not in get_args(Holding):
        raise ArgumentError(f"{option} {given} is not there; give one of {', '.join(get_args(Holding))}")
    return given == "together" or (given == "auto" and not torch.cuda.is_available())


def concurrencies(text: str) -> list[int]:
    """Requests at once, from a list with commas.

    Raises:
        ArgumentError: it is no such list, or one is not positive.
    """
    found = numbers("--concurrency", text, int)
    for number in found:
        check_integer("--concurrency", number, minimum=1)
    return list(dict.fromkeys(found))


def temperatures(text: str) -> list[float]:
    """Temperatures, from a list with commas.

    Raises:
        ArgumentError: it is no such list, or one is out of vLLM's range.
    """
    found = numbers("--temperature", text, float)
    for number in found:
        if not 0 <= number <= 2:
            raise ArgumentError(f"--temperature {number} is not allowed; give 0 to 2")
    return list(dict.fromkeys(found))


def measurements_file(json_file: Path | None, report: Path | None, name: str) -> Path | None:
    """Where measured cells go: a report is made of a file.

    Raises:
        ArgumentError: the folder of the report cannot be made.
    """
    if report is None:
        return json_file
    try:
        report.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"--report {report} cannot be made ({error.strerror}); give another folder") from error
    return json_file or report / f"{name}.jsonl"


def require_vllm() -> None:
    """Raises ArgumentError where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise ArgumentError(
            "vLLM is not installed; install it as CONTRIBUTING.md says, or measure with bench standalone"
        )


def _rivals(models: Models, named: Sequence[str] | None) -> list[System]:
    found = [NGRAM, *([SUFFIX] if find_spec("arctic_inference") else [])]
    if models.draft_model:
        found.append(draft_model(models.draft_model))
    for text in named or ():
        name, separator, config = text.partition("=")
        if not separator or not name.isidentifier():
            raise ArgumentError(f'--rival {text!r} has no name; give NAME=JSON, like eagle={{"method": "eagle", ...}}')
        if name in TAKEN or name in (system.name for system in found):
            raise ArgumentError(f"--rival {name} is taken by a system that is measured anyway; give another name")
        found.append(System(name, name, as_object(f"--rival {name}", config)))
    return found


def _check_path(option: str, model: str) -> None:
    """Refuses paths without a model; a hub id is looked up by vLLM."""
    path = Path(model)
    if (path / "config.json").is_file():
        return
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ArgumentError(f"{option} {model} is no directory with a config.json; give one, or owner/name of the hub")


def check_chat(chat: bool, verifier: str) -> None:
    """Refuses a chat template that is not there.

    Raises:
        ArgumentError: the verifier's tokenizer has none.
    """
    if not chat:
        return
    try:
        template = AutoTokenizer.from_pretrained(verifier, trust_remote_code=False).chat_template
    except (OSError, ValueError) as error:
        raise ArgumentError(f"--chat needs the tokenizer of {verifier}, which cannot be read ({error})") from error
    if template is None:
        raise ArgumentError(f"--chat needs a chat template, and {verifier} has none; leave it out for plain text")


def as_object(option: str, text: str | None) -> dict[str, Any]:
    """A JSON object; empty without text.

    Raises:
        ArgumentError: it is something else.
    """
    try:
        value = json.loads(text) if text else {}
    except ValueError as error:
        raise ArgumentError(f"{option} {text!r} is not JSON ({error}); give an object in single quotes") from error
    if not isinstance(value, dict):
        raise ArgumentError(f"{option} {text!r} is not an object; give one, like {{}}")
    return value
