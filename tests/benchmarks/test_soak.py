"""The soak: short ones of real servers, and whether it sees what it looks for."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any

import pytest

from tests.vllm_plugin.fork_server import COMPILED, shared_fork_server
from twotower_bench.servers.server import Endpoint
from twotower_bench.soak import Limits, Soak, plans_of
from twotower_bench.soak.answers import Answer, Choice, Difference, ask_all, difference
from twotower_bench.soak.checks import MIB, Findings, Side, checks_of
from twotower_bench.soak.traffic import KINDS, Traffic
from twotower_bench.soak.watch import HELD, Holding, IdlePoint, error_lines, holdings, wait_until_idle
from twotower_spec.errors import ArgumentError

ROOT = Path(__file__).parents[2]
KNOBS = {"policy": "fixed", "verification": "coupled"}
LIMITS = Limits(most_new_tokens=16)


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM")
@pytest.mark.parametrize("name", ["attention-v1", "itself-v1"])
def test_three_laps_leave_nothing_behind(name: str) -> None:
    (plan,) = plans_of(name)
    rows: list[Mapping[str, Any]] = []
    checks = Soak(plan, replace(plan.limits(), most_new_tokens=16), 0, KNOBS, environment=COMPILED).run(
        rows.append, shared_fork_server()
    )
    assert [check for check in checks if not check.holds] == [], rows
    assert {row["kind"] for row in rows if row["row"] == "kind"} == {kind.__name__ for kind in KINDS}


def point(num_requests: int, memory_bytes: int = 500 * MIB, num_fds: int = 30, num_threads: int = 8) -> IdlePoint:
    return IdlePoint(num_requests, {"worker": Holding(memory_bytes, num_fds, num_threads)}, dict.fromkeys(HELD, 0.0))


def side(*points: IdlePoint) -> Side:
    return Side(num_requests=300, num_answered=290, num_left=10, points=list(points) or [point(100), point(300)])


COUNTERS = {"preemptions": 3, "hits": 64, "accepted": 900, "faults": 0}


def sound() -> Findings:
    """A soak in which everything held."""
    return Findings(drafting=side(), plain=side(), num_greedy=50, num_seeded=20, counters=COUNTERS)


def failing(findings: Findings) -> list[str]:
    return [check.what for check in checks_of(findings) if not check.holds]


def greedy(limits: Limits = LIMITS) -> Any:
    return Traffic(limits).completion("lengths", [1, 2, 3], streams=False)


def test_a_sound_soak_holds() -> None:
    assert failing(sound()) == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"drafting": side(point(100), point(300, 521 * MIB))}, "memory of worker"),
        ({"drafting": side(point(100), point(300, num_fds=31))}, "descriptors of worker"),
        ({"drafting": side(point(100), point(300, num_threads=9))}, "threads of worker"),
        ({"drafting": replace(side(), num_answered=289)}, "requests answered"),
        ({"plain": replace(side(), num_answered=289)}, "requests answered without speculation"),
        ({"num_greedy": 0}, "temperature-0 answers equal to those without speculation"),
        ({"num_seeded": 0}, "answers to a seed equal in repeats"),
        ({"drafting": replace(side(), errors=["ERROR one"])}, "error lines in the log"),
        ({"counters": {**COUNTERS, "preemptions": 0}}, "preemptions"),
        ({"counters": {**COUNTERS, "hits": 0}}, "prompt tokens from the prefix cache"),
        ({"counters": {**COUNTERS, "accepted": 0}}, "drafts accepted"),
        ({"counters": {**COUNTERS, "faults": 1}}, "rounds and steps that failed"),
    ],
)
def test_every_check_can_fail(change: dict[str, Any], what: str) -> None:
    assert failing(replace(sound(), **change)) == [what]


def test_what_the_server_without_speculation_does_too_is_not_the_drafters() -> None:
    grown = side(point(100), point(300, 600 * MIB, num_fds=32, num_threads=9))
    both = replace(grown, errors=["ERROR the same"])
    assert failing(replace(sound(), drafting=both, plain=both)) == []


def test_a_request_that_holds_something_while_nobody_asks_is_found() -> None:
    held = replace(point(300), held={**dict.fromkeys(HELD, 0.0), "requests in the drafter's pool": 2.0})
    (check,) = (one for one in checks_of(replace(sound(), drafting=side(point(100), held))) if not one.holds)
    assert check.found == "2 requests in the drafter's pool"


def test_growth_begins_when_a_server_is_warm() -> None:
    warming = [point(100, 400 * MIB), point(200), point(300), point(400), point(500), point(600), point(700)]
    assert "memory of worker" in failing(replace(sound(), drafting=side(*warming[:2]), plain=side(*warming[1:3])))
    assert failing(replace(sound(), drafting=side(*warming), plain=side(*warming[1:], point(800)))) == []


def test_a_planted_difference_is_found() -> None:
    request, answer = greedy(), Answer([Choice("A text.", token_ids=[5, 6, 7], finish_reason="length")])
    assert difference(request, answer, answer) is None
    for name, value in (("text", "A test."), ("token_ids", [5, 6, 8]), ("finish_reason", "stop")):
        other = Answer([replace(answer.choices[0], **{name: value})])
        found = difference(request, other, answer)
        assert found is not None and found.what == name
        assert json.loads(json.dumps(found.as_json))["found"]["choices"][0][name] == value
    assert difference(request, Answer(), answer) is not None
    found = Difference(request, "text", answer, answer)
    assert failing(replace(sound(), greedy=[found], seeded=[found])) == [
        "temperature-0 answers equal to those without speculation",
        "answers to a seed equal in repeats",
    ]


def test_log_probabilities_may_differ_by_rounding_and_by_no_more() -> None:
    request = greedy()
    one, near, far = (Answer([Choice(log_probabilities=[-1.0, value])]) for value in (-2.0, -2.0001, -2.01))
    assert difference(request, near, one) is None
    assert difference(request, far, one) is not None


def test_error_lines_are_found_without_where_and_when() -> None:
    log = """(Worker pid=9083) WARNING 11-29 19:39:42 [__init__.py:211] min_p won't work with speculative decoding.
(APIServer pid=4) ERROR 11-29 19:44:14 [parser.py:117] Error in extracting
(EngineCore pid=5) ERROR 11-29 19:44:14 [faults.py:80] TwoTower: a drafting round failed
Traceback (most recent call last):
INFO:     127.0.0.1:47364 - "GET /health HTTP/1.1" 200 OK
"""
    assert error_lines(log) == [
        "ERROR [parser.py:117] Error in extracting",
        "ERROR [faults.py:80] TwoTower: a drafting round failed",
        "Traceback (most recent call last):",
    ]


GROWING = """
import sys, threading
held = []
print("ready", flush=True)
for line in sys.stdin:
    held.append((bytearray(64 * 2**20), open(sys.argv[0])))
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    print("grown", flush=True)
"""


def test_a_process_that_grows_is_seen_growing(tmp_path: Path) -> None:
    script = tmp_path / "growing.py"
    script.write_text(GROWING)
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        points = []
        for i in range(2):
            process.stdout.readline()
            points.append(IdlePoint(i, {"worker": holdings(process.pid)["API server"]}, {}))
            process.stdin.write("more\n")
            process.stdin.flush()
        process.kill()
    assert failing(replace(sound(), drafting=side(*points))) == [
        "memory of worker",
        "descriptors of worker",
        "threads of worker",
    ]


def test_a_lap_has_every_kind_and_the_same_seed_gives_the_same() -> None:
    laps = [dict(Traffic(LIMITS).lap(number)) for number in (0, 0, 1)]
    assert set(laps[0]) == {kind.__name__ for kind in KINDS} and len(laps[0]["burst"]) == 5 * LIMITS.max_num_seqs
    assert laps[0] == laps[1]
    assert laps[0]["lengths"] != laps[2]["lengths"]
    lengths = [len(request.given["prompt"]) for request in laps[0]["lengths"]]
    assert min(lengths) == 1 and max(lengths) == LIMITS.max_model_len - 1
    for requests in laps[0].values():
        for request in requests:
            assert request.is_chat or (
                len(request.given["prompt"]) + request.given["max_tokens"] <= LIMITS.max_model_len
            )
    # The others come with seeds in every lap, so that their answers can be compared.
    assert sorted(map(seeded, laps[0].values())) == sorted(map(seeded, laps[2].values()))


def seeded(requests: list[Any]) -> list[str]:
    return sorted(json.dumps(request.given, sort_keys=True) for request in requests if request.has_seed)


@contextmanager
def answering(status: int, body: Mapping[str, Any] | str) -> Iterator[Endpoint]:
    """A server that answers everything alike."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield Endpoint(f"http://127.0.0.1:{server.server_port}", "model", "model")
        server.shutdown()


def completion(text: str, finish_reason: str) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "finish_reason": finish_reason, "logprobs": None, "token_ids": [4, 5]}
    return {"id": "1", "object": "text_completion", "created": 0, "model": "model", "choices": [choice]}


@pytest.mark.skipif(not find_spec("openai"), reason="needs the client")
@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (200, completion("A cat is 3.", "stop"), ""),
        (200, completion("three cats", "stop"), "not of the grammar: 'three cats'"),
        (200, completion("three cats", "abort"), "ended by abort"),
        (500, {"error": {"message": "engine died"}}, "InternalServerError: Error code: 500 - engine died"),
    ],
)
def test_an_answer_that_is_none_is_said_to_be_none(status: int, body: dict[str, Any], error: str) -> None:
    request = replace(greedy(), grammar=r"[A-Z][a-z ]+ is [0-9]\.")
    with answering(status, body) as endpoint:
        (answer,) = asyncio.run(ask_all(endpoint, [request]))
    assert answer.error == error
    assert answer.has_left is False


def test_a_server_that_does_not_become_idle_is_looked_at_all_the_same() -> None:
    with answering(200, 'vllm:twotower_pool_used{engine="0",resource="requests"} 2.0\n') as endpoint:
        found = wait_until_idle(endpoint, os.getpid(), 7, within_s=0)
    assert found.num_requests == 7
    assert {what for what, value in found.held.items() if value} == {"requests in the drafter's pool"}


def test_plans_are_named_with_commas() -> None:
    assert [plan.name for plan in plans_of("itself-v1, attention-v2,itself-v1")] == ["itself-v1", "attention-v2"]
    with pytest.raises(ArgumentError, match=r"--plan dense is not there; give some of attention-v1, hybrid-v1"):
        plans_of("dense")


def test_prompts_have_the_length_that_is_asked_for() -> None:
    traffic = Traffic(LIMITS)
    assert [len(traffic.prompts.take(Random(0), length)) for length in (1, 17, 250)] == [1, 17, 250]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--plan", "dense"], "error: --plan dense is not there"),
        (["--minutes", "-1"], "error: --minutes -1 is no length of time; give 0 or more"),
        (["--policy", "all"], "error: twotower knob policy 'all' is not"),
        (["--output", "no/such/folder/rows"], "error: --output no/such/folder/rows cannot be written"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(words: list[str], said: str) -> None:
    command = [sys.executable, "-m", "benchmarks.soak", *words]
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "vllm_plugin", "benchmarks"))
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and result.stderr.startswith(said)


def test_what_ends_stock_vllm_is_left_out() -> None:
    request = Traffic(LIMITS).completion("seeds", [1], temperature=1, seed=3, top_p=0.9, extra_body={"top_k": 5})
    assert request.without({"seed"}).given == {name: value for name, value in request.given.items() if name != "seed"}
    fewer = request.without({"seed", "top_k", "top_p"}).given
    assert fewer == {"prompt": [1], "temperature": 1, "max_tokens": 16, "extra_body": {"return_token_ids": True}}
