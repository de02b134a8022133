"""The two servers of a plan: one that drafts, and one without speculation that is asked the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch

from twotower_bench.child_process import signals_held
from twotower_bench.environment import Runner, on_runner
from twotower_bench.fork_server import ForkServer
from twotower_bench.servers.server import VllmServer, free_ports
from twotower_bench.soak.chats import chat_arguments
from twotower_spec.demo.trio import trio_path
from twotower_spec.errors import ArgumentError

Verifier = Literal["attention", "hybrid", "itself"]

NUM_SPECULATIVE_TOKENS = 7
# Parameters that end the engine of stock vLLM without a GPU: a seed where a prompt is read in pieces, which the plugin
# repairs, and on V2 filters, whose kernel Triton's interpreter cannot run; the plugin has its own.
ENDS_STOCK_VLLM: Mapping[Runner, frozenset[str]] = {
    "V1": frozenset({"seed"}),
    "V2": frozenset({"seed", "top_k", "top_p"}),
}
# oneDNN keeps code for every number of tokens that a step had, up to 1024 of them; the plugin has it keep 128, and the
# server without speculation is to grow by no more.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}


@dataclass(frozen=True)
class Limits:
    """Sizes of both servers: little enough that prompts are read in pieces and requests are thrown out.

    Attributes:
        max_model_len, max_num_seqs, max_num_batched_tokens: vLLM's.
        num_blocks: of keys, values and states, whatever each of them holds.
        most_new_tokens: that a request asks for, but for those that are to fill `max_model_len`.
    """

    max_model_len: int = 256
    max_num_seqs: int = 6
    max_num_batched_tokens: int = 96
    num_blocks: int = 20
    most_new_tokens: int = 40


@dataclass(frozen=True)
class SoakPlan:
    """Choice of servers to soak.

    Attributes:
        verifier: the bundled verifier with attention alone; the context tower of the bundled T, which has Mamba layers;
            or the same one that drafts for itself.
        runner: vLLM's model runner.
    """

    verifier: Verifier
    runner: Runner

    @property
    def name(self) -> str:
        """Name on the command line."""
        return f"{self.verifier}-{self.runner.lower()}"

    @property
    def model(self) -> str:
        """Directory of the model that both servers serve."""
        return str(trio_path("verifier" if self.verifier == "attention" else "twotower"))

    def limits(self, is_interpreted: bool = False) -> Limits:
        """Limits with which requests of this verifier begin and are thrown out while they grow.

        Args:
            is_interpreted: kernels run in Triton's interpreter, a step of which costs a tenth of a second.
        """
        # A block has 32 tokens, beside Mamba states 96; of these a request holds 1 + K and one more, in a block each.
        if is_interpreted:
            return Limits(max_num_seqs=3, num_blocks=11 if self.verifier == "attention" else 20, most_new_tokens=12)
        return Limits()

    def speculative_config(self, knobs: Mapping[str, Any]) -> dict[str, Any]:
        """vLLM's speculative settings of the server that drafts."""
        return {
            "method": "twotower",
            "model": str(trio_path("twotower")),
            "num_speculative_tokens": NUM_SPECULATIVE_TOKENS,
            "twotower": {**({} if self.verifier == "attention" else {"self": self.verifier == "itself"}), **knobs},
        }


PLANS = {plan.name: plan for runner in get_args(Runner) for plan in (SoakPlan(v, runner) for v in get_args(Verifier))}


def plans_of(text: str) -> list[SoakPlan]:
    """Plans by their names, with commas between them.

    Raises:
        ArgumentError: one is not there.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PLANS:
            raise ArgumentError(f"--plan {name} is not there; give some of {', '.join(PLANS)}, with commas")
    return [PLANS[name] for name in dict.fromkeys(names)]


def serve_arguments(plan: SoakPlan, limits: Limits, folder: Path) -> list[str]:
    """Arguments of `vllm serve` for both servers."""
    words = ["--dtype", "float32", "--enforce-eager", "--enable-prefix-caching", "--block-size", "32"]
    words += ["--max-model-len", str(limits.max_model_len), "--max-num-seqs", str(limits.max_num_seqs)]
    words += ["--max-num-batched-tokens", str(limits.max_num_batched_tokens)]
    words += ["--num-gpu-blocks-override", str(limits.num_blocks)]
    return [*words, *chat_arguments(folder)]


@contextmanager
def running_pair(
    plan: SoakPlan,
    limits: Limits,
    knobs: Mapping[str, Any],
    further: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    fork_server: ForkServer | None = None,
) -> Iterator[tuple[VllmServer, VllmServer]]:
    """The server that drafts and the one that does not, ready; both are ended in the end.

    Args:
        plan, limits: what they serve, and how much at once.
        knobs: of the drafter.
        further: arguments of `vllm serve` for both.
        environment: variables for both, beside `ENVIRONMENT`.
        fork_server: see `VllmServer`.

    Raises:
        ChildError: one of them could not be started.
    """
    variables = {**ENVIRONMENT, **on_runner(plan.runner), **(environment or {})}
    drafting = ["--speculative-config", json.dumps(plan.speculative_config(knobs))]
    started: list[VllmServer] = []
    with TemporaryDirectory(prefix="soak-") as folder, ExitStack() as stack:
        for title, more, port in zip(("drafts", "no drafts"), (drafting, []), free_ports(2), strict=True):
            own = Path(folder) / str(port)
            own.mkdir()
            words = [*serve_arguments(plan, limits, own), *further, *more]
            with signals_held():
                server = VllmServer(title, plan.model, words, port, own, variables, fork_server)
                stack.callback(server.kill)
            started.append(server)
            if torch.cuda.is_available():  # each sizes its cache by the memory that it finds free
                server.wait_until_ready()
        for server in started:
            server.wait_until_ready()
        yield started[0], started[1]
