"""`twotower-spec bench sweep`: which way to draft serves a verifier best, at which load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, get_args

import typer

from twotower_bench.child_process import ended_by_signals
from twotower_bench.cli import options
from twotower_bench.cli.measured_systems import baselines
from twotower_bench.cli.options import numbers
from twotower_bench.cli.tables import print_remarks, print_section, too_long
from twotower_bench.engines import EnginePool, EngineSpec
from twotower_bench.engines.measuring import ServingRun
from twotower_bench.grid import draft_settings, knobs_of, system_of
from twotower_bench.measurement_file import SystemsFile
from twotower_bench.recommendation import Goal, GoalName, recommend
from twotower_bench.records import ALL_CATEGORIES, DraftSetting, Load, ServingCell
from twotower_bench.schedule import Candidate, complete, engine_of, in_order, key_of_slot
from twotower_bench.serving_profile import serving_profile
from twotower_bench.systems import engine_spec
from twotower_spec.errors import ArgumentError
from twotower_spec.evaluation import load_prompts
from twotower_spec.files import check_writable
from twotower_spec.terminal import Terminal

# Rounds of prompts before a setting counts under a load.
NUM_WARM_UP = 2
# The report has more.
TABLES = ("Best at each concurrency", "Pareto front")


def sweep(
    verifier: options.Verifier = None,
    drafter: options.Drafter = None,
    dataset: options.Dataset = "trio",
    category: options.Category = None,
    prompts: Annotated[int, typer.Option(help="Prompts of every cell, balanced over the categories.")] = 48,
    max_new_tokens: options.MaxNewTokens = 64,
    gamma: options.Gammas = "0.8",
    block_size: options.BlockSizes = "4,8,16",
    steps: options.Steps = "1,4",
    policy: Annotated[str, typer.Option(help="fixed, threshold, adaptive.")] = "fixed,threshold,adaptive",
    num_speculative_tokens: Annotated[
        int | None, typer.Option("--num-speculative-tokens", "-K", help="Drafts per round; default: the whole block.")
    ] = None,
    first_token: Annotated[str, typer.Option(help="Tower of the first draft: context or denoiser.")] = "context",
    temperature: Annotated[str, typer.Option(help="Of the verifier, with commas.")] = "0",
    concurrency: options.Concurrency = "1,4,8,16",
    repeat: options.Repeat = 3,
    goal: Annotated[
        str, typer.Option(help="throughput: most tokens/s in all; latency: fastest for one user.")
    ] = "throughput",
    at_concurrency: Annotated[int | None, typer.Option(help="The load that the goal is about; default: any.")] = None,
    min_user_tokens_per_s: Annotated[
        float | None, typer.Option(help="What every user shall have at least, with --goal throughput.")
    ] = None,
    chat: options.Chat = False,
    engine_args: options.EngineArgs = None,
    engines: options.Engines = "auto",
    json_file: options.JsonFile = None,
    overwrite: options.Overwrite = False,
    profile: Annotated[Path | None, typer.Option(help="Write a profile for `plan --profile` to this file.")] = None,
    report: options.ReportFolder = None,
) -> None:
    """Every way of TwoTower to draft under every load, the best compromises, and the flags for your goal.

    Settings that draft the same are measured once. No speculation is measured, too, twice (A/A): where no setting is
    faster beyond what these two differ by, that is what is recommended.
    """
    # Everything that can be refused is checked before anything is loaded.
    options.require_packages()
    options.check_sizes(prompts, max_new_tokens, repeat)
    at_once, temperatures = options.concurrencies(concurrency), options.temperatures(temperature)
    wanted = _goal(goal, min_user_tokens_per_s, at_concurrency, at_once)
    settings = draft_settings(
        num_speculative_tokens,
        numbers("--gamma", gamma, float),
        numbers("-S", block_size, int),
        numbers("--steps", steps, int),
        policy.split(","),
        first_token,
    )
    together = options.held_together("--engines", engines)
    models = options.Models.of(verifier, drafter, None, engine_args, max(at_once))
    options.check_chat(chat, models.verifier)
    texts = load_prompts(dataset, category, prompts)
    options.check_at_once(max(at_once), {"": len(texts)})
    loads = [Load(ALL_CATEGORIES, number, heat) for heat in temperatures for number in at_once]
    candidates, specs = _candidates(models, settings, repeat)
    json_file = options.measurements_file(json_file, report, "sweep")
    profile = profile or (report and report / "profile.json")
    if profile:
        check_writable(profile, option="--profile")
    content = ["sweep", models.identity, max_new_tokens, chat, [asdict(one) for one in texts]]
    record = SystemsFile(content, "serving_cell", ServingCell, [one.system for one in candidates])
    pool = EnginePool(specs, together, longest_silence_s=options.LONGEST_SILENCE_S)
    with ended_by_signals(), record.opened(json_file, overwrite), pool:
        run = ServingRun(pool, texts, max_new_tokens, chat, NUM_WARM_UP)
        slots = in_order(candidates, loads, repeat, None if together else engine_of)
        cells = complete(record, slots, key_of_slot, run.measure)
    from twotower_bench.report.engines import sweep_section  # matplotlib
    from twotower_bench.report.reading import Measurements

    console, section = Terminal(), sweep_section(Measurements("", serving_cells=cells))
    print_section(console, section, *TABLES)
    for heat in temperatures:
        if len(temperatures) > 1:
            console.rule(f"temperature {heat:g}")
        best = recommend([one for one in section.figures if one.load.temperature == heat], wanted)
        console.print(best.sentence, soft_wrap=True)
        for line in (best.serve_command, best.python_call):
            console.print(f"\n    {line(models.verifier, models.arguments)}", soft_wrap=True)
        console.print()
    print_remarks(console, too_long(len(texts), [one.prompt_id for cell in cells for one in cell.requests]), record)
    if profile:
        where = record.where
        serving_profile(cells, where["command"], where["machine"], where["versions"]).save(profile)
        console.print(f"twotower-spec plan --profile {profile}", soft_wrap=True)
    options.write_report_of(report, json_file)


def _goal(name: str, floor: float | None, concurrency: int | None, measured: Sequence[int]) -> Goal:
    if name not in get_args(GoalName):
        raise ArgumentError(f"--goal {name!r} is not there; give one of {', '.join(get_args(GoalName))}")
    if concurrency is not None and concurrency not in measured:
        raise ArgumentError(f"--at-concurrency {concurrency} is not among --concurrency; give one of these")
    return Goal(name, floor, concurrency)  # type: ignore[arg-type]  # checked above


def _candidates(
    models: options.Models, settings: Sequence[DraftSetting], num_repeats: int
) -> tuple[list[Candidate], Mapping[str, EngineSpec]]:
    """No speculation, and one engine for all settings of as many drafts: vLLM knows no other number of them."""
    candidates = [Candidate(one, one.name) for one in baselines(num_repeats)]
    specs = {one.system.name: engine_spec(one.system, models.verifier, models.arguments) for one in candidates}
    for setting in settings:
        system, drafts = system_of(setting, models.drafter), setting.num_speculative_tokens
        candidates.append(Candidate(system, f"twotower-{drafts}", knobs_of(setting)))
        specs.setdefault(f"twotower-{drafts}", engine_spec(system, models.verifier, models.arguments))
    return candidates, specs
