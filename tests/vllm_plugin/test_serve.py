"""`vllm serve V --speculative-model T`, asked over HTTP, and the engine for asyncio."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.vllm_plugin.engine import ROOMY, run_engine
from tests.vllm_plugin.fork_server import run_forked
from tests.vllm_plugin.installed import tells_acceptance_per_request
from tests.vllm_plugin.server import serving
from twotower_bench.servers.forked_server import fork_workers
from twotower_bench.servers.server import VllmServer
from twotower_bench.soak.chats import NAMED, TOOL, chat_arguments
from twotower_spec.demo.trio import held_out_prompts, trio_path

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a server for chats with reasoning and tools."""
    return [*chat_arguments(tmp_path_factory.mktemp("chat")), "--max-num-seqs", "8"]


@pytest.fixture(scope="module")
def server(chats: list[str]) -> Iterator[VllmServer]:
    arguments = [*chats, "--speculative-model", str(trio_path("twotower")), "--spec-tokens", "15"]
    arguments += [
        "--additional-config",
        '{"twotower": {"log_interval_s": 1, "policy": "fixed"}}',
    ]  # whatever the clock says
    if tells_acceptance_per_request():
        arguments += ["--per-request-spec-decode-metrics", "summary"]
    with serving(*arguments) as running:
        yield running


@pytest.fixture(scope="module")
def plain_server(chats: list[str]) -> Iterator[VllmServer]:
    """Likewise, without drafts."""
    with serving(*chats) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: VllmServer) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=server.endpoint.url + "/v1", api_key="none")


def prompts() -> list[str]:
    return [held_out_prompts("maths")[0].prompt, held_out_prompts("python")[0].prompt]


def test_greedy_text_is_that_of_an_engine_without_drafts(server: VllmServer, client: Any) -> None:
    expected = run_engine(["plain_text"], None, **ROOMY)["plain_text"]
    found = client.completions.create(
        model=server.endpoint.model,
        prompt=prompts(),
        temperature=0,
        max_tokens=40,
        extra_body={"return_token_ids": True},
    )
    assert [choice.token_ids for choice in found.choices] == [row[0] for row in expected[:2]]


def test_streamed_pieces_make_the_same_text(server: VllmServer, client: Any) -> None:
    given: dict[str, Any] = {"model": server.endpoint.model, "prompt": prompts()[1], "temperature": 0, "max_tokens": 60}
    whole = client.completions.create(**given).choices[0].text
    pieces = [part.choices[0].text for part in client.completions.create(**given, stream=True)]
    assert "".join(pieces) == whole
    assert len(pieces) < 60  # several tokens in one piece


def test_sampled_requests_of_every_kind_are_answered(server: VllmServer, client: Any) -> None:
    for extra in ({"top_k": 20}, {"min_p": 0.1}, {"top_k": 5, "repetition_penalty": 1.1}):
        found = client.completions.create(
            model=server.endpoint.model,
            prompt=prompts()[0],
            temperature=0.7,
            n=2,
            max_tokens=16,
            top_p=0.9,
            extra_body=extra,
        )
        assert len(found.choices) == 2
    biased = client.completions.create(
        model=server.endpoint.model, prompt=prompts()[0], max_tokens=8, temperature=0, logit_bias={"300": 100}
    )
    assert biased.choices[0].text


def test_metrics_carry_the_drafter_next_to_vllm(server: VllmServer, client: Any) -> None:
    client.completions.create(model=server.endpoint.model, prompt=prompts()[0], temperature=0, max_tokens=60)
    lines = dict(
        line.rsplit(" ", 1) for line in server.endpoint.get("/metrics").splitlines() if not line.startswith("#")
    )
    values = {name.partition("{")[0]: float(value) for name, value in lines.items() if "twotower" in name}
    assert values["vllm:twotower_denoiser_passes_total"] > 0
    assert values["vllm:twotower_acceptance_length"] > 1.5
    assert values["vllm:twotower_pool_size"] > 0
    for phase in ("extend", "denoise", "host"):
        assert float(lines[f'vllm:twotower_drafting_seconds_total{{engine="0",phase="{phase}"}}']) > 0
    assert 'vllm:twotower_fallbacks_total{engine="0",reason="no room"}' in lines
    accepted = sum(float(v) for n, v in lines.items() if n.startswith("vllm:spec_decode_num_accepted_tokens_total"))
    assert accepted == values["vllm:twotower_accepted_tokens_total"] > 0


def test_the_log_says_where_memory_went_and_how_drafting_goes(server: VllmServer, client: Any) -> None:
    for _ in range(3):
        client.completions.create(model=server.endpoint.model, prompt=prompts()[1], temperature=0, max_tokens=80)
        time.sleep(0.6)
    log = server.log.read_text()
    assert "TwoTower metrics: Mean acceptance length:" in log
    assert "MiB" in next(line for line in log.splitlines() if "TwoTower: " in line and "float32" in line)


def test_a_request_says_how_its_drafts_were_accepted(server: VllmServer, client: Any) -> None:
    if not tells_acceptance_per_request():
        pytest.skip("vLLM has no --per-request-spec-decode-metrics")
    found = client.completions.create(model=server.endpoint.model, prompt=prompts()[0], temperature=0, max_tokens=60)
    said = found.model_dump()["metrics"]["speculative_decoding"]
    assert said["num_spec_tokens"] == 15 and said["num_draft_tokens"] > 0


@dataclass(frozen=True)
class Chat:
    """One chat with both servers.

    Attributes:
        server, plain_server: one that drafts and one that does not.
    """

    server: VllmServer
    plain_server: VllmServer

    def ask(self, server: VllmServer, **given: Any) -> Any:
        """Asks a server."""
        from openai import OpenAI

        chat = [{"role": "user", "content": held_out_prompts("maths")[2].prompt}]
        made = OpenAI(base_url=server.endpoint.url + "/v1", api_key="none").chat.completions
        return made.create(model=server.endpoint.model, messages=chat, temperature=0, max_completion_tokens=90, **given)

    def messages(self, **given: Any) -> tuple[Any, Any]:
        """Asks both, of which the first has accepted drafts."""
        drafted, plain = (self.ask(server, **given) for server in (self.server, self.plain_server))
        if tells_acceptance_per_request():
            assert drafted.model_dump()["metrics"]["speculative_decoding"]["num_accepted_draft_tokens"] > 0
        return drafted.choices[0].message, plain.choices[0].message


@pytest.fixture
def chat(server: VllmServer, plain_server: VllmServer) -> Chat:
    return Chat(server, plain_server)


def test_reasoning_is_parsed_as_without_drafts(chat: Chat) -> None:
    drafted, plain = chat.messages()
    assert drafted == plain
    assert drafted.reasoning.endswith("step by step.\n") and drafted.content.startswith(" one:")
    parts = [part.choices[0].delta for part in chat.ask(chat.server, stream=True) if part.choices]
    streamed = [(getattr(part, "reasoning", None) or "", part.content or "") for part in parts]
    assert tuple(map("".join, zip(*streamed, strict=True))) == (drafted.reasoning, drafted.content)


@pytest.mark.parametrize("tool_choice", [NAMED, "required"], ids=["named", "required"])
def test_a_tool_is_called_after_reasoning_as_without_drafts(chat: Chat, tool_choice: Any) -> None:
    drafted, plain = chat.messages(tools=[TOOL], tool_choice=tool_choice, parallel_tool_calls=False)
    calls = [one.tool_calls[0].function for one in (drafted, plain)]
    assert calls[0] == calls[1] and calls[0].name == "work_out"
    assert set(json.loads(calls[0].arguments)) == {"left", "sign", "right"}
    assert drafted.reasoning == plain.reasoning
    assert drafted.reasoning.endswith("step by step.\n")


def write_tokens(prompt: str, output: str) -> None:
    """Runs an engine for asyncio in this process, as a server does."""
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.engine.async_llm_engine import AsyncLLMEngine

    async def generate() -> list[int]:
        arguments = AsyncEngineArgs(
            model=str(trio_path("verifier")),
            dtype="float32",
            max_model_len=512,
            enforce_eager=True,
            speculative_config={"model": str(trio_path("twotower")), "num_speculative_tokens": 15},
        )
        engine = AsyncLLMEngine.from_engine_args(arguments)
        async for row in engine.generate(prompt, SamplingParams(temperature=0, max_tokens=40), "one"):
            last = row
        engine.shutdown()
        return list(last.outputs[0].token_ids)

    fork_workers()
    Path(output).write_text(json.dumps(asyncio.run(generate())))


def test_the_engine_for_asyncio_drafts_too(tmp_path: Path) -> None:
    output, environment = tmp_path / "tokens.json", {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with TemporaryDirectory(prefix="async-") as folder:  # sockets lie in it, see `serving`
        order = ("tests.vllm_plugin.test_serve:write_tokens", prompts()[0], str(output))
        code = run_forked(*order, folder=Path(folder), environment=environment, timeout_s=300)
        log = (Path(folder) / "log").read_text()
    assert code == 0, log[-3000:]
    assert json.loads(output.read_text()) == run_engine(["plain_text"], None, **ROOMY)["plain_text"][0][0]
    assert "Loaded custom proposer class 'vllm_twotower.TwoTowerProposer'" in log
