"""Options that the benchmarks in vLLM share, and what is made of them; what is not allowed is an `ArgumentError`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import torch
import typer

from twotower_bench.systems import TRIO_ARGUMENTS
from twotower_spec.config import check_integer
from twotower_spec.demo import trio_path
from twotower_spec.errors import ArgumentError
from twotower_spec.extras import require_extra
from twotower_spec.reading import is_directory, is_file, parse_json

Verifier = Annotated[
    str | None, typer.Option(help="The model whose text is kept: a directory or hub id; default: the bundled one.")
]
Drafter = Annotated[str | None, typer.Option(help="TwoTower checkpoint: likewise.")]
DraftModel = Annotated[str | None, typer.Option(help="An AR draft model as a rival; default: the bundled one.")]
Dataset = Annotated[str, typer.Option(help="A named set, a file, or a hub id; see docs/evaluation.md.")]
Category = Annotated[list[str] | None, typer.Option(help="Only prompts of this category; can be repeated.")]
Chat = Annotated[bool, typer.Option("--chat", help="First turns in the verifier's chat template, not plain text.")]
MaxNewTokens = Annotated[int, typer.Option(help="Most new tokens per prompt.")]
Temperature = Annotated[float, typer.Option(help="Of the verifier; above 0 texts are not compared.")]
Concurrency = Annotated[str, typer.Option(help="Requests at once, with commas.")]
BlockSizes = Annotated[str, typer.Option("--block-size", "-S", help="Positions that are denoised, with commas.")]
Gammas = Annotated[str, typer.Option("--gamma", help="Confidence thresholds, with commas.")]
Steps = Annotated[str, typer.Option(help="Most denoising steps per block, with commas.")]
Repeat = Annotated[
    int, typer.Option(help="Passes over everything, of which medians are taken; 3 or more for verdicts.")
]
Rival = Annotated[
    list[str] | None,
    typer.Option(
        "--rival",
        help="NAME=JSON, another speculative config of vLLM, or mtp, by the verifier's own layers; can be repeated.",
    ),
]
Only = Annotated[
    str | None, typer.Option(help="Names of systems, with commas, of those measured beside no speculation.")
]
SpeculativeConfig = Annotated[
    str | None, typer.Option(help='How TwoTower drafts, as JSON: {"num_speculative_tokens": 7, "twotower": {...}}.')
]
EngineArgs = Annotated[
    str | None, typer.Option(help='Arguments of LLM() for all systems, as JSON: {"tensor_parallel_size": 4}.')
]
Engines = Annotated[
    str,
    typer.Option(
        help="together: all at once; in-turn: one at a time, loaded anew when its turn comes; auto: in-turn on a GPU."
    ),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="JSON lines, one per finished cell; a stopped run goes on.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Begin --json anew.")]
ReportFolder = Annotated[Path | None, typer.Option("--report", help="Folder for the report of it: HTML and JSON.")]

Number = TypeVar("Number", int, float)
Holding = Literal["auto", "together", "in-turn"]

# What summaries and their tables, in a terminal or a report, are made with.
REPORTING = ("pandas", "scipy", "matplotlib", "jinja2")
# Large models take their time to load, and a cell may have many prompts.
LONGEST_SILENCE_S = 3600.0
MOST_REPEATS = 1000


@dataclass(frozen=True)
class Models:
    """Models to measure with, and the arguments that they get.

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
        """Models and arguments that measurements must share to be compared, as JSON."""
        # More requests at once go on with a file.
        return [
            same_model(self.verifier),
            same_model(self.drafter),
            {name: value for name, value in self.arguments.items() if name != "max_num_seqs"},
        ]

    @classmethod
    def of(
        cls,
        verifier: str | None,
        drafter: str | None,
        draft_model: str | None,
        engine_args: str | None,
        max_num_seqs: int,
    ) -> Models:
        """The bundled ones where none are named."""
        for option, model in (("--verifier", verifier), ("--drafter", drafter), ("--draft-model", draft_model)):
            if model is not None:
                check_model_path(option, model)
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


def same_model(model: str) -> str:
    """A name that a model has from whatever working directory: of a directory its whole path, else the hub id."""
    return str(Path(model).resolve()) if is_directory(Path(model)) else model


def numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """Numbers with commas between them."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ArgumentError(f"{option} {text!r} is not a list of numbers; give them with commas, like 4,8") from error


def held_together(option: str, given: str) -> bool:
    """Whether all engines or servers are held at once."""
    if given not in get_args(Holding):
        raise ArgumentError(f"{option} {given} is not there; give one of {', '.join(get_args(Holding))}")
    return given == "together" or (given == "auto" and not torch.cuda.is_available())


def check_sizes(prompts: int, max_new_tokens: int, repeat: int) -> None:
    """Refuses a measurement of nothing, and one that never ends."""
    for name, value in (("--prompts", prompts), ("--max-new-tokens", max_new_tokens)):
        check_integer(name, value, minimum=1)
    check_repeat(repeat)


def check_repeat(repeat: int) -> None:
    """Refuses a number of passes whose plan would fill the memory."""
    check_integer("--repeat", repeat, minimum=1, maximum=MOST_REPEATS)


def check_at_once(most: int, groups: Mapping[str, int]) -> None:
    """Refuses more requests at once than there are: numbers would be of fewer than they name.

    Args:
        most: the largest number at once.
        groups: prompts that are served together, by their category; "" for all of them.
    """
    name, fewest = min(groups.items(), key=lambda group: group[1])
    if most > fewest:
        what = f"of each category, {name} has {fewest}" if name else f"at least, there are {fewest}"
        raise ArgumentError(
            f"--concurrency {most} needs {most} prompts {what}; give --prompts {most * len(groups)} or more, or a "
            f"lower concurrency"
        )


def concurrencies(text: str) -> list[int]:
    """Requests at once, from a list with commas."""
    found = numbers("--concurrency", text, int)
    for number in found:
        check_integer("--concurrency", number, minimum=1)
    return list(dict.fromkeys(found))


def temperatures(text: str) -> list[float]:
    """Temperatures, from a list with commas."""
    found = numbers("--temperature", text, float)
    for number in found:
        if not 0 <= number <= 2:
            raise ArgumentError(f"--temperature {number} is not allowed; give 0 to 2")
    return list(dict.fromkeys(found))


def measurements_file(json_file: Path | None, report: Path | None, name: str) -> Path | None:
    """Where measured cells go: a report is made of a file."""
    if report is None:
        return json_file
    try:
        report.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"--report {report} cannot be made ({error.strerror}); give another folder") from error
    return json_file or report / f"{name}.jsonl"


def require_packages() -> None:
    """Checks that vLLM, and what loads, summaries and reports are made with, are there."""
    if find_spec("vllm") is None:
        raise ArgumentError(
            "vLLM is not installed; install it as CONTRIBUTING.md says, or measure with bench standalone"
        )
    require_extra("bench", *REPORTING)


def write_report_of(report: Path | None, *files: Path | None) -> None:
    """The report on what is in files, if one is wanted."""
    if report:
        from twotower_bench.report import write_report  # matplotlib and jinja2

        write_report([file for file in files if file], report)


def check_model_path(option: str, model: str) -> None:
    """Refuses paths without a model; a hub id is looked up by vLLM."""
    path = Path(model)
    if is_file(path / "config.json"):
        return
    if is_file(path) or is_directory(path) or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ArgumentError(f"{option} {model} is no directory with a config.json; give one, or owner/name of the hub")


def check_chat(chat: bool, verifier: str) -> None:
    """Refuses a chat template that is not there."""
    if not chat:
        return
    from twotower_spec.checkpoint import find_tokenizer  # seconds, that no other option costs

    tokenizer = find_tokenizer(verifier)
    if tokenizer is None or tokenizer.chat_template is None:
        raise ArgumentError(f"--chat needs a chat template, and {verifier} has none; leave it out for plain text")


def as_object(option: str, text: str | None) -> dict[str, Any]:
    """A JSON object; empty without text."""
    value = parse_json(text, f"{option} {text!r}", "give an object in single quotes", None) if text else {}
    if not isinstance(value, dict):
        raise ArgumentError(f"{option} {text!r} is not an object; give one, like {{}}")
    return value
