"""`twotower-spec bench serve`: `vllm serve` under load, with each way to speculate."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import typer

from twotower_bench.child_process import ended_by_signals
from twotower_bench.cli import options, serve_options
from twotower_bench.cli.measured_systems import systems_of
from twotower_bench.cli.options import same_model
from twotower_bench.cli.tables import print_remarks, print_section
from twotower_bench.measurement_file import SystemsFile
from twotower_bench.records import LatencyBound, LoadPoint, System
from twotower_bench.schedule import complete, key_of_slot
from twotower_bench.servers import Endpoint, ServePlan, Workload, measure_endpoint, measure_servers
from twotower_spec.errors import ArgumentError
from twotower_spec.evaluation import load_prompts
from twotower_spec.terminal import Terminal

THE_SERVER = System("server", "the server")


def serve(
    verifier: options.Verifier = None,
    drafter: options.Drafter = None,
    draft_model: options.DraftModel = None,
    dataset: options.Dataset = "trio",
    category: options.Category = None,
    prompts: Annotated[int, typer.Option(help="Prompts per load, balanced over the categories.")] = 32,
    max_new_tokens: options.MaxNewTokens = 64,
    concurrency: Annotated[
        str, typer.Option(help="Closed loops: requests at once, with commas; '' for none.")
    ] = "1,4,8,16",
    request_rate: Annotated[
        str, typer.Option(help="Open loops: requests per second, with commas; '' for none.")
    ] = "1,2,4",
    goodput: Annotated[
        str, typer.Option(help="Milliseconds within which a request is good: any of ttft, tpot, e2el.")
    ] = "ttft:500,tpot:50",
    temperature: options.Temperature = 0.0,
    repeat: options.Repeat = 3,
    rival: options.Rival = None,
    only: options.Only = None,
    speculative_config: options.SpeculativeConfig = None,
    chat: options.Chat = False,
    serve_args: Annotated[str, typer.Option(help="Further arguments of `vllm serve`, for all systems.")] = "",
    servers: Annotated[
        str,
        typer.Option(
            help="together: all at once; in-turn: one at a time, started anew in every repeat; auto: in-turn on a GPU."
        ),
    ] = "auto",
    base_url: Annotated[str | None, typer.Option(help="A server that runs already; only that is measured.")] = None,
    json_file: options.JsonFile = None,
    overwrite: options.Overwrite = False,
    report: options.ReportFolder = None,
) -> None:
    """Throughput, latency and goodput of `vllm serve` over HTTP, with TwoTower and its rivals.

    The load generator is vLLM's own, `vllm bench serve`. Every load gets the same prompts from all systems, in turn and
    repeated; no speculation runs twice (A/A), and a speed-up within what these two differ by is called no difference.
    """
    # Everything that can be refused is checked before anything starts.
    options.require_packages()
    options.check_sizes(prompts, max_new_tokens, repeat)
    (temperature,) = options.temperatures(str(temperature))
    bound = LatencyBound.parse(goodput)
    traffics = serve_options.traffics_of(concurrency, request_rate)
    found = load_prompts(dataset, category, prompts)
    options.check_at_once(serve_options.largest_loop(traffics), {"": len(found)})
    texts = tuple(one.turns[0] if chat else one.text for one in found)
    workload = Workload(texts, chat, max_new_tokens, temperature, bound)
    endpoint = None
    if base_url is not None:
        if any((drafter, draft_model, rival, only, speculative_config, serve_args, servers != "auto")):
            raise ArgumentError(
                "--base-url measures a server that runs already; leave out --drafter, --draft-model, --rival, --only, "
                "--speculative-config, --serve-args and --servers"
            )
        endpoint = Endpoint.of_running_server(base_url, verifier)
        plan = ServePlan(endpoint.model, (), (THE_SERVER,), traffics, repeat, "together", workload)
    else:
        models = options.Models.of(verifier, drafter, draft_model, None, serve_options.most_at_once(traffics))
        options.check_chat(chat, models.verifier)
        if verifier is None:
            serve_options.check_lengths(texts, max_new_tokens)
        plan = ServePlan(
            models.verifier,
            # How many requests a user's verifier can hold is the user's to say.
            serve_options.serve_arguments(serve_args, models.arguments if verifier is None else {}),
            systems_of(models, speculative_config, rival, only, repeat),
            traffics,
            repeat,
            "together" if options.held_together("--servers", servers) else "in-turn",
            workload,
        )
    json_file = options.measurements_file(json_file, report, "serve")
    server = endpoint.url if endpoint else [serve_args, verifier is None]
    record = points_file(plan, server)
    measure = partial(measure_endpoint, plan, endpoint) if endpoint else partial(measure_servers, plan)
    with ended_by_signals(), record.opened(json_file, overwrite):
        points = complete(record, plan.slots(), key_of_slot, measure)
    from twotower_bench.report.reading import Measurements  # matplotlib
    from twotower_bench.report.serve import serve_section

    console = Terminal()
    print_section(console, serve_section(Measurements("", load_points=points)))
    asked = (
        f"{len(texts)} prompts of {dataset}, up to {max_new_tokens} new tokens, temperature {temperature:g}, "
        f"{repeat} repeats, servers {plan.mode}"
    )
    print_remarks(console, [asked], record)
    options.write_report_of(report, json_file)


def points_file(plan: ServePlan, server: Any) -> SystemsFile[LoadPoint]:
    """Makes the file of a run.

    Args:
        plan: more systems, loads or repeats go on with a file; another verifier or workload does not.
        server: JSON of what the user said about servers; another does not, either. Not the arguments that servers get:
            those of the trio grow with the largest load.
    """
    content = [same_model(plan.verifier), plan.mode, asdict(plan.workload), server]
    return SystemsFile(content, "load_point", LoadPoint, plan.systems)
