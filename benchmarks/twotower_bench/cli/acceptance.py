"""`twotower-spec bench acceptance`: TwoTower and its rivals in real vLLM, by category of prompts."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Annotated

import typer

from twotower_bench.child_process import ended_by_signals
from twotower_bench.cli import options
from twotower_bench.cli.measured_systems import systems_of
from twotower_bench.cli.tables import print_remarks, print_section, too_long
from twotower_bench.engines import EnginePool
from twotower_bench.engines.measuring import ServingRun
from twotower_bench.measurement_file import SystemsFile
from twotower_bench.records import Load, ServingCell
from twotower_bench.schedule import Candidate, complete, engine_of, in_order, key_of_slot
from twotower_bench.systems import engine_spec
from twotower_spec.evaluation import load_prompts
from twotower_spec.terminal import Terminal

# The report has more.
TABLES = ("Speed and latency", "What drafts gain", "Accepted at each position that was reached", "Time of a round")


def acceptance(
    verifier: options.Verifier = None,
    drafter: options.Drafter = None,
    draft_model: options.DraftModel = None,
    dataset: options.Dataset = "trio",
    category: options.Category = None,
    prompts: Annotated[int, typer.Option(help="Prompts, balanced over the categories.")] = 24,
    max_new_tokens: options.MaxNewTokens = 64,
    concurrency: options.Concurrency = "1",
    temperature: options.Temperature = 0.0,
    repeat: options.Repeat = 5,
    rival: options.Rival = None,
    only: options.Only = None,
    speculative_config: options.SpeculativeConfig = None,
    chat: options.Chat = False,
    engine_args: options.EngineArgs = None,
    engines: options.Engines = "auto",
    json_file: options.JsonFile = None,
    overwrite: options.Overwrite = False,
    report: options.ReportFolder = None,
) -> None:
    """Acceptance and speed of TwoTower in vLLM beside no speculation, n-gram, suffix, a draft model, and yours.

    The same prompts for all, in turn and repeated; no speculation runs twice (A/A), and a speed-up within what these
    two differ by is called no difference. Texts are compared with those without speculation.
    """
    # Everything that can be refused is checked before anything is loaded.
    options.require_packages()
    options.check_sizes(prompts, max_new_tokens, repeat)
    at_once = options.concurrencies(concurrency)
    (temperature,) = options.temperatures(str(temperature))
    together = options.held_together("--engines", engines)
    models = options.Models.of(verifier, drafter, draft_model, engine_args, max(at_once))
    systems = systems_of(models, speculative_config, rival, only, repeat)
    options.check_chat(chat, models.verifier)
    texts = load_prompts(dataset, category, prompts)
    by_category = Counter(prompt.category for prompt in texts)
    options.check_at_once(max(at_once), by_category)
    loads = [Load(name, number, temperature) for number in at_once for name in by_category]
    json_file = options.measurements_file(json_file, report, "acceptance")
    content = [models.identity, max_new_tokens, chat, [asdict(one) for one in texts]]
    record = SystemsFile(content, "serving_cell", ServingCell, systems)
    specs = {one.name: engine_spec(one, models.verifier, models.arguments) for one in systems}
    pool = EnginePool(specs, together, longest_silence_s=options.LONGEST_SILENCE_S)
    with ended_by_signals(), record.opened(json_file, overwrite), pool:
        run = ServingRun(pool, texts, max_new_tokens, chat)
        candidates = [Candidate(one, one.name) for one in systems]
        slots = in_order(candidates, loads, repeat, None if together else engine_of)
        cells = complete(record, slots, key_of_slot, run.measure)
    console = Terminal()
    from twotower_bench.report.engines import acceptance_section  # matplotlib
    from twotower_bench.report.reading import Measurements

    print_section(console, acceptance_section(Measurements("", serving_cells=cells)), *TABLES)
    print_remarks(console, too_long(len(texts), [one.prompt_id for cell in cells for one in cell.requests]), record)
    options.write_report_of(report, json_file)
