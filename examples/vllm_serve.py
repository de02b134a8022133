"""Serve a model with a TwoTower drafter, ask it as any OpenAI client does, and look at the drafter's metrics.

    python examples/vllm_serve.py
    python examples/vllm_serve.py --verifier DIR --drafter DIR --prompt "Once upon a time"
    python examples/vllm_serve.py -- --per-request-spec-decode-metrics summary       # vLLM 0.30 and later
    python examples/vllm_serve.py --url http://localhost:8000                        # a server that runs already

What stands after `--` goes to `vllm serve`. The server this script starts is, but for the port,

    vllm serve VERIFIER --speculative-model DRAFTER --spec-tokens 15

and stops with the script: at its end, on Ctrl-C, and when something fails. About 40 seconds on a CPU.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch
from openai import OpenAI

from twotower_spec.demo import held_out_prompts, trio_path

SECONDS_TO_START = 600
SECONDS_TO_STOP = 30


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verifier", default=str(trio_path("verifier")), help="the model whose text it is")
    parser.add_argument("--drafter", default=str(trio_path("twotower")), help="a TwoTower checkpoint")
    parser.add_argument("--prompt", default=held_out_prompts("maths")[0].prompt)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--url", help="ask this server and start none")
    parser.add_argument("serve_arguments", nargs="*", help="after --: more arguments for `vllm serve`")
    return parser.parse_args()


def serve_command(options: argparse.Namespace, port: int) -> list[str]:
    """`vllm serve` of this Python, on PATH or not."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", options.verifier, "--port", str(port)]
    command += ["--speculative-model", options.drafter, "--spec-tokens", "15"]
    command += ["--max-model-len", "512", "--max-num-seqs", "8"]
    if not torch.cuda.is_available():
        command += ["--dtype", "float32", "--enforce-eager"]
    return command + options.serve_arguments


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running_server(options: argparse.Namespace) -> Iterator[str]:
    """Address of a server that lives as long as the block."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    # With one thread small models are about ten times as fast on a CPU.
    environment = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    with tempfile.NamedTemporaryFile(prefix="vllm-", suffix=".log") as log:
        # In a session of its own it does not see Ctrl-C: this script gets it, and stops the server.
        server = subprocess.Popen(
            serve_command(options, port), env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            wait_until_healthy(url, server, Path(log.name))
            yield url
        finally:
            stop(server)


def wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    start = time.monotonic()
    while time.monotonic() - start < SECONDS_TO_START:
        if server.poll() is not None:
            sys.exit(f"{log.read_text(errors='replace')[-4000:]}\nvllm serve ended with {server.returncode}, see above")
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            print(f"{url} is healthy after {time.monotonic() - start:.0f} s\n")
            return
        time.sleep(0.5)
    sys.exit(f"{log.read_text(errors='replace')[-4000:]}\nvllm serve is not healthy after {SECONDS_TO_START} s")


def stop(server: subprocess.Popen[bytes]) -> None:
    """Lets the server end by itself, then ends what is left of it and its engine processes."""
    try:
        server.terminate()
        server.wait(SECONDS_TO_STOP)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def ask(url: str, prompt: str, max_tokens: int) -> None:
    """Prints a completion while it comes, and what vLLM says about its drafts."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    print(prompt, end="", flush=True)
    stream = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        # Several tokens come at once where drafts were accepted.
        print("".join(choice.text for choice in chunk.choices), end="", flush=True)
        if chunk.usage:
            print(f"\n\n{chunk.usage.completion_tokens} tokens; {getattr(chunk, 'metrics', None) or ''}\n")


def print_metrics(url: str) -> None:
    """The lines of /metrics that are about drafting."""
    with urllib.request.urlopen(f"{url}/metrics") as page:
        for line in page.read().decode().splitlines():
            if line.startswith(("vllm:twotower_", "vllm:spec_decode_")) and "_created" not in line:
                print(line)


def main() -> None:
    options = parse_arguments()
    # Whoever ends this script, and however, ends its server: both signals become exceptions.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    server = contextlib.nullcontext(options.url.rstrip("/")) if options.url else running_server(options)
    try:
        with server as url:
            ask(url, options.prompt, options.max_tokens)
            print_metrics(url)
    except KeyboardInterrupt:
        sys.exit("stopped")


if __name__ == "__main__":
    main()
