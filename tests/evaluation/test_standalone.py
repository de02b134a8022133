"""The model alone: settings, cells, figures, and the command that resumes."""

import importlib.metadata
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.support.command_line import Command
from twotower_bench.records import read_row
from twotower_bench.schedule import in_order
from twotower_spec.checkpoint import load_tokenizer
from twotower_spec.cli import app
from twotower_spec.demo import trio_path
from twotower_spec.errors import ArgumentError
from twotower_spec.evaluation.datasets import load_prompts
from twotower_spec.evaluation.standalone import AR, BASELINES, Cell, measure, summarise, sweep
from twotower_spec.generation.options import Mode, ModeOptions
from twotower_spec.model import TwoTowerModel

EOS = [2]
SELF_SPECULATIVE = BASELINES[2]


@pytest.fixture(scope="module")
def towers() -> TwoTowerModel:
    return TwoTowerModel.from_pretrained(trio_path("twotower"), dtype="float32", progress=False)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(trio_path("twotower"))
    assert tokenizer is not None
    return [list(tokenizer(prompt.text)["input_ids"]) for prompt in load_prompts(limit=3)]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def diffusion(block_size: int, steps_per_block: int, confidence_threshold: float | None = None) -> ModeOptions:
    """Mask diffusion as `sweep` has it."""
    options = ModeOptions(Mode.MASK_DIFFUSION, block_size, steps_per_block, confidence_threshold)
    return options.without_idle_steps()


def cell(setting: ModeOptions, repeat: int, seconds: float, texts: list[list[int]], passes: int = 0) -> Cell:
    num = len(texts)
    return Cell(setting, repeat, [seconds] * num, texts, [passes] * num, [2] * num, {})


def test_settings_that_generate_the_same_are_run_once() -> None:
    assert diffusion(4, 1, 0.5) == diffusion(4, 1, 0.95)
    assert diffusion(4, 16, 0.5) == diffusion(4, 4, 0.5)
    settings = sweep([0.5, 0.8, 0.95], [4, 8, 16], [1, 2, 4, 16])
    assert len(settings) == len(set(settings)) == len(BASELINES) + 7 + 10 + 10


def test_more_steps_than_tokens_in_a_block_change_nothing(towers: TwoTowerModel, prompts: list[list[int]]) -> None:
    results = [
        towers.generate_mask_diffusion(prompts, 9, block_size=3, steps_per_block=steps, confidence_threshold=0.6)
        for steps in (3, 7)
    ]
    assert results[0].token_ids == results[1].token_ids
    assert results[0].num_denoiser_passes == results[1].num_denoiser_passes


@pytest.mark.parametrize("setting", [*BASELINES, diffusion(5, 3, 0.7)], ids=lambda s: s.label)
def test_stream_of_a_setting_is_what_it_generates(
    towers: TwoTowerModel, prompts: list[list[int]], setting: ModeOptions
) -> None:
    streamed: list[list[int]] = [[] for _ in prompts]
    options = setting.complete(max_new_tokens=7, eos_token_id=EOS, seed=0)
    for block in towers.stream(prompts, options):
        streamed[block.row].extend(block.token_ids)
    assert streamed == towers.generate(prompts, options).token_ids


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("tree",), "tree"),
        (("ar", 8), "ar"),
        (("mask-diffusion", 0), "0"),
        (("mask-diffusion", 8, 8, 1.5), "1.5"),
    ],
)
def test_setting_out_of_range_is_refused_with_its_value(arguments: tuple[Any, ...], word: str) -> None:
    with pytest.raises(ArgumentError, match=word):
        ModeOptions(*arguments)


def test_every_repeat_runs_every_setting_in_another_order() -> None:
    settings = sweep([0.5], [2, 3, 5], [2])
    order = in_order(settings, [None], 3)
    repeats = [[slot.subject for slot in order if slot.repeat == i] for i in range(3)]
    assert all(set(one) == set(settings) and len(one) == len(settings) for one in repeats)
    assert repeats[0] != repeats[1] != repeats[2]
    assert order == in_order(settings, [None], 3)


def test_self_speculation_has_the_text_of_ar_and_fewer_context_passes(
    towers: TwoTowerModel, prompts: list[list[int]]
) -> None:
    cells = [measure(towers, setting, 0, prompts, 17, EOS) for setting in BASELINES]
    ar, mock_ar, self_speculative = summarise(cells)
    assert ar.speed_up == 1 and ar.identical.value == 1 and ar.tokens_per_nfe is None
    assert self_speculative.identical.value == 1
    assert self_speculative.common_prefix.value == ar.length
    assert self_speculative.tokens_per_context_pass.value > 1
    assert mock_ar.tokens_per_nfe is not None and mock_ar.tokens_per_nfe.value == pytest.approx(1)


def test_text_ends_with_the_token_that_ends_the_document(towers: TwoTowerModel, prompts: list[list[int]]) -> None:
    setting = diffusion(8, 1)
    text = towers.generate(prompts[:1], setting.complete(max_new_tokens=8)).token_ids[0]
    stop = text[2]
    kept = measure(towers, setting, 0, prompts[:1], 8, [stop])
    assert kept.token_ids == [text[: text.index(stop) + 1]]


def test_figures_are_medians_and_compare_with_ar_of_the_same_repeat() -> None:
    other = diffusion(4, 1)
    texts, changed = [[5, 6, 7, 8], [5, 6, 7, 8]], [[5, 6, 7, 8], [5, 9, 7, 8]]
    cells = [cell(AR, i, 2.0 * slow, texts) for i, slow in enumerate((1, 10, 1))]
    cells += [cell(other, i, 1.0 * slow, changed, passes=1) for i, slow in enumerate((1, 10, 1))]
    ar, blocks = summarise(cells)
    assert ar.tokens_per_s.value == 2 and blocks.tokens_per_s.value == 4
    assert blocks.speed_up == 2
    assert blocks.tokens_per_nfe is not None and blocks.tokens_per_nfe.value == 4
    assert blocks.tokens_per_context_pass.value == 2
    assert blocks.identical.value == 0.5
    assert blocks.common_prefix.value == 2.5


def test_repeats_without_ar_beside_them_give_no_figures() -> None:
    other = diffusion(4, 1)
    figures = summarise([cell(other, 0, 1.0, [[3]], 1), cell(AR, 1, 1.0, [[3]])])
    assert [row.setting for row in figures] == [AR]


def test_text_that_took_no_denoiser_pass_leaves_the_figure_to_the_others() -> None:
    drafted = SELF_SPECULATIVE
    one = Cell(drafted, 0, [1.0, 1.0], [[2], [4, 5, 6]], [0, 1], [1, 2], {})
    figures = summarise([cell(AR, 0, 1.0, [[2], [4, 5, 6]]), one])[1]
    assert figures.tokens_per_nfe is not None and figures.tokens_per_nfe.value == 3


def test_cell_survives_json() -> None:
    one = cell(diffusion(4, 2, 0.5), 1, 0.25, [[1, 2], []], 3)
    assert read_row(Cell, {**json.loads(json.dumps(asdict(one))), "index": 4}) == one


SMALL = ("--prompts", 2, "--max-new-tokens", 5, "--dtype", "float32", "--gamma", "0.5", "-S", "3")


def test_command_goes_on_with_its_file_and_runs_nothing_twice(tmp_path: Path, command: Command) -> None:
    file = tmp_path / "cells.jsonl"
    code, out, _ = command("bench", "standalone", *SMALL, "--steps", 1, "--repeat", 1, "--json", file)
    assert code == 0
    assert "self-speculative" in out and "mask-diffusion" in out and "2 prompts of trio" in out
    first = file.read_text().splitlines()
    assert len(first) == 4
    row = json.loads(first[0])
    assert row["machine"]["torch"] and "commit" in row["machine"] and row["versions"]["numpy"]
    assert row["command"].startswith("twotower-spec bench standalone --prompts 2")
    # A kill in the middle of a line, then more settings and repeats.
    file.write_text("\n".join(first) + '\n{"index": 4, "ki')
    code, _, _ = command("bench", "standalone", *SMALL, "--steps", "1,2", "--repeat", 2, "--json", file)
    lines = file.read_text().splitlines()
    assert code == 0
    assert lines[:4] == first
    cells = [read_row(Cell, json.loads(line)) for line in lines]
    assert len({(one.setting, one.repeat) for one in cells}) == len(cells) == 10


def test_file_of_other_prompts_is_refused(tmp_path: Path, command: Command) -> None:
    file = tmp_path / "cells.jsonl"
    file.write_text('{"index": 0, "run": "other"}\n')
    code, _, err = command("bench", "standalone", *SMALL, "--json", file)
    assert code == 2
    assert "give another --json, or --overwrite" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gamma", "0.5,x"), "--gamma '0.5,x'"),
        (("--gamma", "2"), "confidence_threshold 2"),
        (("--steps", "0"), "steps_per_block 0"),
        (("--repeat", "0"), "--repeat 0"),
        (("--prompts", "0"), "limit 0"),
        (("--dataset", "no-such-set"), "no-such-set"),
        (("--limit", "3"), "name one with --task"),
        (("--dtype", "int8"), "int8"),
    ],
)
def test_bad_option_is_one_sentence_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, command: Command, arguments: tuple[str], words: str
) -> None:
    monkeypatch.setattr(TwoTowerModel, "from_pretrained", lambda *_: pytest.fail("weights were read"))
    code, _, err = command("bench", "standalone", *arguments)
    assert code == 2
    assert words in err and err.startswith("error: ") and err.count("\n") == 1


def greet(name: str = "you") -> None:
    """Says hello."""
    typer.echo(f"hello {name}")


def test_entry_point_named_bench_dot_name_joins_the_bench_command(
    monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    entry = importlib.metadata.EntryPoint("bench.greet", f"{__name__}:greet", app.COMMANDS_GROUP)
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda _: greet)
    monkeypatch.setattr(app, "entry_points", lambda group: [entry] if group == app.COMMANDS_GROUP else [])
    assert command("bench", "greet", "--name", "there")[:2] == (0, "hello there\n")
    code, out, _ = command("bench", "--help")
    assert code == 0 and "greet" in out
    assert command("greet")[0] == 2
