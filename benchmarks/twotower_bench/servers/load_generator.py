"""vLLM's own load generator, `vllm bench serve`, in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twotower_bench.child_process import ChildError
from twotower_bench.connected_process import ConnectedProcess
from twotower_bench.environment import engine_environment
from twotower_bench.fork_server import ForkedProcess, ForkServer
from twotower_bench.records import LatencyBound, LoadPoint, Quantiles, System, Traffic
from twotower_bench.servers.server import Endpoint, Server, without_proxy

WORKER = "twotower_bench.servers.load_worker"
LOOKS_EVERY_S = 1.0
ERROR_CHARACTERS = 300


@dataclass(frozen=True)
class Workload:
    """Requests that every server gets.

    Attributes:
        prompts: texts, in order.
        is_chat: prompts are what a user says, for the verifier's chat template; else texts to continue.
        max_new_tokens: a text ends earlier where the model ends it.
        temperature: of the verifier.
        bound: which requests are good.
    """

    prompts: tuple[str, ...]
    is_chat: bool
    max_new_tokens: int
    temperature: float
    bound: LatencyBound


class LoadGenerator:
    """Starts loading when it is made."""

    def __init__(self, workload: Workload, folder: Path, fork_server: ForkServer | None = None) -> None:
        """Starts the process and returns at once.

        Args:
            workload: what it asks.
            folder: for its output and temporary files, its own.
            fork_server: forks the process; None for a fresh one.
        """
        self.workload, self._dataset = workload, folder / "prompts.jsonl"
        rows = ({"prompt": prompt, "output_tokens": workload.max_new_tokens} for prompt in workload.prompts)
        self._dataset.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        environment = {**engine_environment(), **without_proxy()}
        name = "the load generator"
        self._process: ConnectedProcess | ForkedProcess
        if fork_server is None:
            self._process = ConnectedProcess(name, WORKER, folder, environment)
        else:
            self._process = fork_server.fork(name, f"{WORKER}:serve_loads", (), folder, environment, is_connected=True)
        assert self._process.connection is not None
        self._connection = self._process.connection

    def measure(self, system: System, server: Server, traffic: Traffic, repeat: int) -> LoadPoint:
        """Asks everything once.

        Args:
            system: what answers.
            server: where it does.
            traffic: how requests come; in an open loop at times that the number of the repeat decides.
            repeat: counts from 0.

        Raises:
            ChildError: the server or the load generator has ended, or no request was answered.
        """
        arguments = bench_arguments(self.workload, self._dataset, server.endpoint, traffic, seed=repeat)
        try:
            self._connection.send(arguments)
            while not self._connection.poll(LOOKS_EVERY_S):
                server.check()
            result = self._connection.recv()
        except (EOFError, ConnectionError):
            code = self._process.wait()
            raise self._process.failure(f"ended with exit code {code} at {system.title}, {traffic}") from None
        server.check()
        if not result["completed"]:
            raise ChildError(f"{system.title} answered no request at {traffic}: {_first_error(result)}")
        return as_point(result, self.workload, system, traffic, repeat)

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.close()


def bench_arguments(workload: Workload, dataset: Path, endpoint: Endpoint, traffic: Traffic, seed: int) -> list[str]:
    """Arguments of `vllm bench serve`."""
    options: dict[str, Any] = {
        "--backend": "openai",
        "--base-url": endpoint.url,
        "--model": endpoint.model,
        "--tokenizer": endpoint.tokenizer,
        "--dataset-name": "custom",
        "--dataset-path": dataset,
        "--custom-output-len": workload.max_new_tokens,
        "--num-prompts": len(workload.prompts),
        "--temperature": workload.temperature,
        "--seed": seed,
        "--percentile-metrics": "ttft,tpot,itl,e2el",
        "--metric-percentiles": 99,
        "--ready-check-timeout-sec": 0,  # a request of its own would be counted
        "--max-concurrency" if traffic.is_closed else "--request-rate": traffic.amount,
    }
    flags = ["--disable-shuffle", "--no-oversample", "--disable-tqdm", "--save-detailed"]
    if not workload.is_chat:
        flags.append("--skip-chat-template")
    arguments = [str(part) for pair in options.items() for part in pair]
    return [*arguments, *flags, "--goodput", *workload.bound.pairs]


def as_point(result: Mapping[str, Any], workload: Workload, system: System, traffic: Traffic, repeat: int) -> LoadPoint:
    """A result of `vllm bench serve --save-detailed` in our words."""
    times = {
        name: Quantiles(result[f"median_{name}_ms"] / 1000, result[f"p99_{name}_ms"] / 1000)
        for name in ("ttft", "tpot", "itl", "e2el")
    }
    texts = zip(result["generated_texts"], result["errors"], strict=True)
    return LoadPoint(
        system=system,
        traffic=traffic,
        repeat=repeat,
        bound=workload.bound,
        temperature=workload.temperature,
        seconds=result["duration"],
        num_good=round(result["request_goodput"] * result["duration"]),
        num_output_tokens=result["total_output_tokens"],
        **times,
        # Absent without speculation: what /metrics counted between the first request and the last.
        num_drafts=result.get("spec_decode_num_drafts", 0),
        num_accepted_tokens=result.get("spec_decode_accepted_tokens", 0),
        texts=tuple(None if error else text for text, error in texts),
    )


def _first_error(result: Mapping[str, Sequence[str]]) -> str:
    """Last line of a request's error, which can be a traceback."""
    lines = next((error for error in result["errors"] if error), "no reason given").strip().splitlines()
    return lines[-1][:ERROR_CHARACTERS]
