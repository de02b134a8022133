"""Examples, run as a newcomer runs them."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

import pytest

from tests.vllm_plugin.fork_server import ROOT, run_forked
from tests.vllm_plugin.installed import tells_acceptance_per_request
from twotower_bench.servers.forked_server import fork_workers
from twotower_spec.demo import held_out_prompts, trio_path

pytestmark = pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM")

PROMPTS = [row.prompt for row in held_out_prompts("maths")[:2]]
MAX_TOKENS = "64"


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(script: str, *arguments: str, code: int = 0) -> str:
    process = start(script, *arguments)
    try:
        out, _ = process.communicate(timeout=500)
    finally:
        process.terminate()
        process.wait(60)
    assert process.returncode == code, f"{script} ended with {process.returncode}\n{out[-6000:]}"
    return out


def children(process_id: int) -> list[int]:
    """Processes that a process started itself."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    return [child for child, parent in pairs if parent == process_id]


def session(session_id: int) -> list[str]:
    """Processes of a session."""
    listed = subprocess.run(["ps", "-o", "pid=,args=", "-s", str(session_id)], capture_output=True, text=True).stdout
    return listed.splitlines()


@pytest.fixture(scope="module")
def drafted(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """Output of the first script, and the texts it wrote to a file.

    It and its engine are forked from a process that has imported vLLM; the other scripts import it themselves.
    """
    folder = tmp_path_factory.mktemp("examples")
    arguments = ("vllm_llm.py", "--max-tokens", MAX_TOKENS, "--save", str(folder / "texts.json"), *PROMPTS)
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with TemporaryDirectory(prefix="script-") as own:  # sockets lie in it, see `serving`
        code = run_forked(f"{__name__}:run_script", *arguments, folder=Path(own), environment=environment)
        out = (Path(own) / "log").read_text()
    assert code == 0, out[-6000:]
    texts: list[str] = json.loads((folder / "texts.json").read_text())
    return out, texts


def run_script(script: str, *arguments: str) -> None:
    """Does in this process what `python` does with a script of the examples."""
    fork_workers()
    path = ROOT / "examples" / script
    sys.argv, sys.path[0] = [str(path), *arguments], str(path.parent)
    runpy.run_path(str(path), run_name="__main__")


class StandIn(BaseHTTPRequestHandler):
    """Stand-in for `vllm serve`: the part that a client sees."""

    ANSWERS = (
        ("/v1/models", "application/json", '{"object": "list", "data": [{"id": "stand-in", "object": "model"}]}'),
        ("/metrics", "text/plain", "vllm:other 1\nvllm:twotower_drafts_total 7\nvllm:spec_decode_num_drafts_total 7\n"),
    )
    PIECES = ({"choices": [{"text": " sixty"}]}, {"choices": [{"text": "-one."}]})

    def do_GET(self) -> None:
        kind, body = next(rest for path, *rest in self.ANSWERS if path == self.path)
        self._answer(kind, body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        events = [*map(json.dumps, self.PIECES), "[DONE]"]
        self._answer("text/event-stream", "".join(f"data: {event}\n\n" for event in events))

    def _answer(self, kind: str, body: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def stand_in() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_the_llm_script_prints_the_text_the_acceptance_length_and_that_drafts_change_nothing(
    drafted: tuple[str, list[str]],
) -> None:
    out, texts = drafted
    assert len(texts) == len(PROMPTS)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert f"--- {prompt}\n+++{text}\n" in out
    length = re.search(r"acceptance length: ([\d.]+) tokens per verification, of (\d+) drafts", out)
    passes = re.search(r"denoiser passes: (\d+)", out)
    assert length is not None and float(length[1]) > 2 and int(length[2]) > 0
    assert passes is not None and int(passes[1]) > 0
    assert f"the same text as without drafts: {len(PROMPTS)} of {len(PROMPTS)}" in out


@pytest.mark.slow
def test_the_serve_script_streams_the_same_text_shows_the_metrics_and_leaves_no_server(
    drafted: tuple[str, list[str]],
) -> None:
    for_vllm = ("--", "--per-request-spec-decode-metrics", "summary") if tells_acceptance_per_request() else ()
    out = run("vllm_serve.py", "--prompt", PROMPTS[0], "--max-tokens", MAX_TOKENS, *for_vllm)
    assert PROMPTS[0] + drafted[1][0] + "\n" in out
    assert re.search(r"^64 tokens; " + (r".*'mean_acceptance_length': [\d.]+" if for_vllm else ""), out, re.MULTILINE)
    assert re.search(r'^vllm:twotower_drafts_total\{engine="0"\} [1-9]', out, re.MULTILINE)
    assert re.search(r"^vllm:spec_decode_num_accepted_tokens_total\{.*\} [1-9]", out, re.MULTILINE)
    url = re.search(r"(http://\S+) is healthy", out)
    assert url is not None
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{url[1]}/health", timeout=5)


def test_the_serve_script_asks_a_server_that_runs_already(stand_in: str) -> None:
    out = run("vllm_serve.py", "--url", stand_in + "/", "--prompt", "How many?")
    assert "How many? sixty-one." in out
    assert "vllm:twotower_drafts_total 7\nvllm:spec_decode_num_drafts_total 7\n" in out
    assert "vllm:other" not in out


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_the_serve_script_stops_its_server_when_it_is_stopped(number: signal.Signals, code: int) -> None:
    process = start("vllm_serve.py")
    try:
        deadline = time.monotonic() + 120
        while not (servers := children(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(5)  # it has begun to start processes of its own
        assert len(servers) == 1 and session(servers[0])
        process.send_signal(number)
        process.communicate(timeout=120)
    finally:
        process.terminate()
        process.wait(60)
    assert process.returncode == code and not session(servers[0])


@pytest.mark.slow
def test_the_serve_script_shows_why_a_server_did_not_start() -> None:
    out = run("vllm_serve.py", "--drafter", str(trio_path("twotower").parent), code=1)
    assert re.search(r"vllm serve ended with \d+, see above$", out.strip())


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("ray"), reason="ray is not installed; pip install 'twotower-spec[ray]'")
def test_the_ray_script_writes_the_same_texts_to_a_file(drafted: tuple[str, list[str]], tmp_path: Path) -> None:
    prompts, results = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    prompts.write_text("".join(json.dumps({"name": i, "prompt": prompt}) + "\n" for i, prompt in enumerate(PROMPTS)))
    out = run("vllm_ray_data.py", "--input", str(prompts), "--output", str(results), "--max-tokens", MAX_TOKENS)
    rows = sorted(map(json.loads, results.read_text().splitlines()), key=lambda row: row["name"])
    assert rows == [
        {"name": i, "prompt": prompt, "text": text, "num_tokens": int(MAX_TOKENS)}
        for i, (prompt, text) in enumerate(zip(PROMPTS, drafted[1], strict=True))
    ]
    # vLLM prints its figures when it ends, and Ray forwards them only if it is fast enough.
    assert "Loaded custom proposer class 'vllm_twotower.TwoTowerProposer'" in out
    assert f"{len(PROMPTS)} results in {results}" in out
