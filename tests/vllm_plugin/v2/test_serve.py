"""`vllm serve` where vLLM runs model runner V2 by itself: streams that come, go and are broken off, over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from tests.vllm_plugin.engine import ROOMY, run_engine
from tests.vllm_plugin.fork_server import TRITON_ON_CPU
from tests.vllm_plugin.server import serving
from twotower_bench.servers.server import VllmServer
from twotower_spec.demo.trio import held_out_prompts, trio_path

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def server() -> Iterator[VllmServer]:
    arguments = ["--speculative-model", str(trio_path("twotower")), "--spec-tokens", "7"]
    arguments += ["--additional-config", '{"twotower": {"policy": "fixed"}}']  # drafts whatever the clock says
    with serving(*arguments, "--max-num-seqs", "8", environment=TRITON_ON_CPU) as running:
        yield running


def test_streams_beside_one_that_is_broken_off_make_the_text_without_drafts(server: VllmServer) -> None:
    from openai import AsyncOpenAI

    names = ("maths", "python")
    prompts = [one.prompt for pair in zip(*map(held_out_prompts, names), strict=False) for one in pair][:4]

    async def stream(client: AsyncOpenAI, prompt: str, most: int | None = None) -> tuple[str, int]:
        """Text of a request, and in how many pieces it came; left after `most` of them."""
        pieces: list[str] = []
        given = {"model": server.endpoint.model, "temperature": 0, "max_tokens": 40 if most is None else 400}
        async with await client.completions.create(prompt=prompt, stream=True, **given) as parts:
            async for part in parts:
                pieces.append(part.choices[0].text)
                if len(pieces) == most:
                    break
        return "".join(pieces), len(pieces)

    async def stream_all() -> list[tuple[str, int]]:
        async with AsyncOpenAI(base_url=server.endpoint.url + "/v1", api_key="none") as client:
            wanted = [stream(client, prompt) for prompt in prompts]
            *found, _ = await asyncio.gather(*wanted, stream(client, prompts[0], most=3))
            return found

    found = asyncio.run(stream_all())
    assert [text for text, _ in found] == run_engine(["plain_strings"], None, **ROOMY)["plain_strings"]
    assert all(pieces < 40 for _, pieces in found)  # several tokens in one piece
    assert "Using V2 Model Runner" in server.log.read_text()


def test_metrics_carry_the_drafter_next_to_vllm(server: VllmServer) -> None:
    lines = dict(
        line.rsplit(" ", 1) for line in server.endpoint.get("/metrics").splitlines() if not line.startswith("#")
    )
    values = {name.partition("{")[0]: float(value) for name, value in lines.items()}
    assert values["vllm:twotower_accepted_tokens_total"] > 80
    assert values["vllm:twotower_denoiser_passes_total"] > 0 and values["vllm:twotower_acceptance_length"] > 1.5
    assert values["vllm:twotower_sampler_fallbacks_total"] == 0
    assert values["vllm:num_requests_running"] == 0
