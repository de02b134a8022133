"""Servers and the load generator: in which order they are used, with which arguments, and how they are reached."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

from tests.benchmarks.test_bench_serve import CLOSED_PROXY, NONE, TWO_TOWER, WORKLOAD, plan, result
from tests.vllm_plugin.fork_server import run_forked
from twotower_bench.records import Traffic
from twotower_bench.schedule import key_of_slot
from twotower_bench.servers.load_generator import as_point, bench_arguments
from twotower_bench.servers.load_worker import serve_loads
from twotower_bench.servers.server import (
    HOST,
    Endpoint,
    VllmServer,
    arguments_of,
    running_servers,
    without_proxy,
)
from twotower_bench.vllm_hooks import SERVING

pytestmark = pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM")


def test_systems_side_by_side_take_turns_under_each_load_in_another_order() -> None:
    slots = plan("together", num_repeats=4).slots()
    pairs = [slots[i : i + 2] for i in range(0, len(slots), 2)]
    assert all(one.place == other.place and one.subject != other.subject for one, other in pairs)
    assert [str(one.place) for one, _ in pairs[:4]] == [str(traffic) for traffic in plan("together").traffics]
    assert 4 <= sum(one.subject.system is NONE for one, _ in pairs) <= 12


def test_systems_in_turn_keep_their_server_for_all_loads_of_a_repeat() -> None:
    slots = plan("in-turn", num_repeats=8).slots()
    parts = [slots[i : i + 4] for i in range(0, len(slots), 4)]
    assert all(len({(slot.subject.engine, slot.repeat) for slot in part}) == 1 for part in parts)
    assert Counter(key_of_slot(slot) for slot in slots) == Counter(
        key_of_slot(slot) for slot in plan("together", num_repeats=8).slots()
    )
    assert {part[0].subject.engine for part in parts[::2]} == {"none", "twotower"}


def test_warming_up_is_at_the_smallest_and_the_largest_closed_loop() -> None:
    assert plan("together").warm_up() == (Traffic(concurrency=1), Traffic(concurrency=4))


def test_servers_differ_in_their_speculation_alone() -> None:
    plain, ours = (arguments_of(system, ["--seed", "3"]) for system in (NONE, TWO_TOWER))
    assert ours == [*plain, "--speculative-config", '{"model": "T"}']


def test_on_a_gpu_a_server_loads_when_the_one_before_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def start(self: VllmServer, title: str, *others: object, **named: object) -> None:
        self.name = title  # type: ignore[attr-defined]
        events.append(f"start {title}")

    monkeypatch.setattr(VllmServer, "__init__", start)
    for name in ("wait_until_ready", "ask_to_end", "close"):
        monkeypatch.setattr(VllmServer, name, lambda self, what=name: events.append(f"{what} {self.name}"))
    for has_gpu in (True, False):
        monkeypatch.setattr("torch.cuda.is_available", lambda answer=has_gpu: answer)
        with running_servers([NONE, TWO_TOWER], "V", []):
            waited = [f"wait_until_ready {NONE.title}"] if has_gpu else []
            assert events == [f"start {NONE.title}", *waited, f"start {TWO_TOWER.title}"]
        events.clear()


@pytest.fixture
def healthy() -> Iterator[Endpoint]:
    """A server that answers everything, on a port of ours."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer((HOST, 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Endpoint(f"http://{HOST}:{server.server_port}", "V", "V")
        server.shutdown()


def test_our_servers_are_asked_without_the_proxy(healthy: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", CLOSED_PROXY)
    assert healthy.is_ready()
    code = f"from urllib.request import urlopen; urlopen({healthy.url + '/health'!r})"
    for more, is_answered in ({}, False), (without_proxy(), True):
        done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **more}, stderr=subprocess.DEVNULL)
        assert (done.returncode == 0) == is_answered


@pytest.mark.parametrize(("before", "after"), [("", HOST), ("internal,.org", f"internal,.org,{HOST}"), ("*", "*")])
def test_hosts_that_need_no_proxy_stay_so(before: str, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", before)
    assert without_proxy() == {"no_proxy": after, "NO_PROXY": after}


def run_changed_load_generator() -> None:
    from vllm.benchmarks import serve as changed

    del changed.main
    serve_loads(None)  # type: ignore[arg-type]


@pytest.mark.slow
def test_load_generator_that_has_changed_is_named(tmp_path: Path) -> None:
    assert run_forked(f"{__name__}:run_changed_load_generator", folder=tmp_path) == 1
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("twotower_spec.errors.TwoTowerError: vLLM") and f"main, needed for {SERVING.purpose}" in last


@pytest.mark.parametrize(
    ("traffic", "option"),
    [(Traffic(concurrency=4), ("--max-concurrency", "4")), (Traffic(request_rate=2.5), ("--request-rate", "2.5"))],
)
def test_load_is_a_concurrency_or_a_rate_of_the_load_generator(traffic: Traffic, option: tuple[str, str]) -> None:
    arguments = bench_arguments(WORKLOAD, Path("p.jsonl"), Endpoint("http://h:1", "V", "V"), traffic, seed=3)
    assert option in set(pairwise(arguments))
    assert ("--max-concurrency" in arguments) != ("--request-rate" in arguments)


def test_drafts_are_those_that_the_server_counted_meanwhile() -> None:
    counted = result(spec_decode_num_drafts=10, spec_decode_accepted_tokens=25)
    point = as_point(counted, WORKLOAD, TWO_TOWER, Traffic(concurrency=4), repeat=0)
    assert (point.num_drafts, point.num_accepted_tokens) == (10, 25)
