"""`vllm serve` with two engines and two API servers: every one shows the numbers of both, and none outlives a kill."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import Request, urlopen

import psutil
import pytest

from tests.vllm_plugin.fork_server import engine_environment
from twotower_bench.servers.server import VllmServer, free_ports
from twotower_spec.demo.trio import held_out_prompts, trio_path
from vllm_twotower.stats_folder import PREFIX, remove_left_over

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.slow,
]

PATIENCE_S = 120
ENGINES = ("0", "1")


@pytest.fixture(scope="module")
def server() -> Iterator[VllmServer]:
    words = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4"]
    words += ["--speculative-model", str(trio_path("twotower")), "--spec-tokens", "7"]
    words += ["--additional-config", '{"twotower": {"policy": "fixed"}}']  # drafts whatever the clock says
    words += ["--data-parallel-size", "2"]  # vLLM takes as many API servers as engines
    verifier, (port,) = str(trio_path("verifier")), free_ports(1)
    # With the processes of a user, not with forked ones: which inherits what is the question here.
    with (
        TemporaryDirectory(prefix="serve-") as folder,
        closing(VllmServer("the trio", verifier, words, port, Path(folder), engine_environment())) as running,
    ):
        running.wait_until_ready()
        yield running


def complete(server: VllmServer, prompt: str) -> None:
    body = {"model": server.endpoint.model, "prompt": prompt, "temperature": 0, "max_tokens": 40}
    headers = {"Content-Type": "application/json"}
    with urlopen(Request(server.endpoint.url + "/v1/completions", json.dumps(body).encode(), headers)) as answer:
        answer.read()


def values(server: VllmServer, name: str, **labels: str) -> dict[str, float]:
    """Value of a metric by engine, as one of the API servers gives it."""
    from prometheus_client.parser import text_string_to_metric_families  # comes with vLLM

    return {
        sample.labels["engine"]: sample.value
        for family in text_string_to_metric_families(server.endpoint.get("/metrics"))
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    }


def comes_true(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True


def test_every_api_server_shows_the_drafters_of_all_engines(server: VllmServer) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda held: complete(server, held.prompt), held_out_prompts("maths")[:8]))
    # Which of the two servers answers is decided by the kernel.
    for _ in range(8):
        assert comes_true(
            lambda: (
                values(server, "vllm:twotower_accepted_tokens_total")
                == values(server, "vllm:spec_decode_num_accepted_tokens_total")
            )
        )
        accepted = values(server, "vllm:twotower_accepted_tokens_total")
        assert tuple(sorted(accepted)) == ENGINES and all(accepted.values())
    idle = dict.fromkeys(ENGINES, 0.0)
    assert comes_true(lambda: values(server, "vllm:twotower_pool_used", resource="requests") == idle)
    assert values(server, "vllm:twotower_pool_used", resource="tokens") == idle


def test_a_killed_server_leaves_no_model_in_memory_and_no_file_after_the_next_start(
    server: VllmServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = psutil.Process(server._process.pid)
    children = main.children(recursive=True)
    # vLLM's coordinator, small and without a plugin, stays, and with it Python's own process that counts semaphores.
    ours = [one for one in children if not {"DPCoordinator", "resource_tracker"} & set(re.split(r"\W+", title(one)))]
    assert len(ours) == 6  # two engines with a worker each, two API servers
    monkeypatch.setattr(tempfile, "tempdir", str(server.log.parent))
    assert len(list(server.log.parent.glob(f"{PREFIX}*"))) == 1
    main.kill()
    _, alive = psutil.wait_procs(ours, timeout=PATIENCE_S)
    for process in children:  # the fixture would find them by their parent, which is gone
        with suppress(psutil.NoSuchProcess):
            process.kill()
    assert not alive
    remove_left_over()
    assert not list(server.log.parent.glob(f"{PREFIX}*"))


def title(process: psutil.Process) -> str:
    return " ".join(process.cmdline())
