"""Processes of `vllm serve` that are stopped and killed, and damaged drafters at its start; a plain server beside."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import psutil

from twotower_bench.child_process import ChildError
from twotower_bench.faults.disks import mounted_disk
from twotower_bench.faults.matrix import DRAFTER
from twotower_bench.faults.trials import Trial
from twotower_bench.fork_server import ForkServer
from twotower_bench.servers.server import VllmServer, free_ports
from twotower_spec.checkpoint.index import SINGLE_FILE
from twotower_spec.demo.trio import held_out_prompts, trio_path
from vllm_twotower.stats_folder import PREFIX

NUM_REQUESTS, NUM_TOKENS = 6, 200
STOPPED_FOR_S = 5.0
# A request that takes longer counts as hanging, and a process that lives longer as left over.
ANSWERED_WITHIN_S = ENDED_WITHIN_S = 120.0
# Of a disk that is filled: what a server writes until it is ready fits.
DISK_BYTES = 256 << 20
SHARED_MEMORY = Path("/dev/shm")
API_SERVER, ENGINE_CORE = "API server", "engine core"

# Beginnings of names of vLLM's files and of ours.
NAMED_AT_RANDOM = ("vllm_dist_", PREFIX)

Answer = tuple[int, ...] | str
Damage = Callable[[Path], None]


class ServedTrio:
    """A server on the bundled verifier, with its processes and files.

    Attributes:
        server: the process that answers.
    """

    def __init__(self, server: VllmServer, folder: Path) -> None:
        """Looks at a server that is ready.

        Args:
            server: that is ready.
            folder: where it has its temporary files.
        """
        self.server, self._folder = server, folder
        self._main = psutil.Process(server._process.pid)
        self._processes = [self._main, *self._main.children(recursive=True)]
        # The titles that vLLM gives its processes do not reach forked ones; beside the engine there are small helpers.
        self._engine = max(self._processes[1:], key=lambda one: int(one.memory_info().rss))
        mapped = [Path(part.path) for one in self._processes for part in one.memory_maps()]
        self._shared_memory = {path for path in mapped if path.parent == SHARED_MEMORY and path.exists()}

    def process(self, name: str) -> psutil.Process:
        """The API server or the engine core."""
        return self._main if name == API_SERVER else self._engine

    def ask(self) -> list[Answer]:
        """Asks all requests at once, and waits for their token ids, or for what was said in their place."""
        with self.asking() as answers:
            return [one.result() for one in answers]

    @contextmanager
    def asking(self) -> Iterator[Sequence[Future[Answer]]]:
        """Requests that are on their way."""
        prompts = [one.prompt for kind in ("maths", "python") for one in held_out_prompts(kind)[: NUM_REQUESTS // 2]]
        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            yield [pool.submit(self._complete, prompt) for prompt in prompts]

    def _complete(self, prompt: str) -> Answer:
        body = {"model": self.server.endpoint.model, "prompt": prompt, "temperature": 0, "max_tokens": NUM_TOKENS}
        body |= {"ignore_eos": True, "return_token_ids": True}
        request = Request(
            f"{self.server.endpoint.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with build_opener(ProxyHandler({})).open(request, timeout=ANSWERED_WITHIN_S) as response:
                return tuple(json.loads(response.read())["choices"][0]["token_ids"])
        except HTTPError as error:
            return f"HTTP {error.code}"
        except TimeoutError:
            return "hang"
        except OSError:
            return "connection closed"

    def num_accepted(self) -> float:
        """Drafts that were accepted so far, by `/metrics`; 0 of a server without drafts."""
        return self._metric("vllm:twotower_accepted_tokens_total")

    def _metric(self, name: str) -> float:
        lines = [line for line in self.server.endpoint.get("/metrics").splitlines() if line.startswith(name)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def left_over(self) -> list[str]:
        """Processes, files and shared memory that are left some time after its end."""
        deadline, alive = time.monotonic() + ENDED_WITHIN_S, self._processes
        while (alive := [one for one in alive if _is_alive(one)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        files = [path for path in sorted(self._folder.iterdir()) if path.name != "log"]
        shared = ["shared memory" for path in self._shared_memory if path.exists()]
        names = ["the engine core" if one == self._engine else "a helper process" for one in alive]
        return names + [_kind_of(file) for file in files] + shared


def _is_alive(one: psutil.Process) -> bool:
    """Whether it is more than an exit code that nobody has asked for."""
    try:
        return bool(one.is_running()) and one.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _kind_of(file: Path) -> str:
    """Name of a file without what differs between two runs."""
    if file.is_socket():
        return "a socket"
    return next((one for one in NAMED_AT_RANDOM if file.name.startswith(one)), file.name)


@contextmanager
def serving(
    fork_server: ForkServer, environment: Mapping[str, str], drafts: bool, arguments: Sequence[str] = ()
) -> Iterator[ServedTrio]:
    """Starts a server, and ends what is left of it.

    Args:
        fork_server: that it is forked from.
        environment: all its variables.
        drafts: whether it drafts, by the fixed policy.
        arguments: beside those that the trio needs.
    """
    # Sockets lie in it, whose paths have 107 characters at most.
    with (
        TemporaryDirectory(prefix="serve-") as name,
        serving_in(Path(name), fork_server, environment, drafts, arguments) as served,
    ):
        yield served


@contextmanager
def serving_in(
    folder: Path, fork_server: ForkServer, environment: Mapping[str, str], drafts: bool, arguments: Sequence[str] = ()
) -> Iterator[ServedTrio]:
    """Starts a server with its log and temporary files in a folder, and ends what is left of it; see `serving`."""
    server = start(fork_server, environment, folder, trio_path("twotower") if drafts else None, arguments)
    try:
        server.wait_until_ready()
        yield ServedTrio(server, folder)
    finally:
        server.kill()


def start(
    fork_server: ForkServer,
    environment: Mapping[str, str],
    folder: Path,
    drafter: Path | None,
    arguments: Sequence[str] = (),
) -> VllmServer:
    """Starts a server and returns at once; arguments as of `serving`."""
    words = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", *arguments]
    if drafter is not None:
        words += ["--speculative-config", json.dumps({**DRAFTER, "model": str(drafter)})]
    (port,) = free_ports(1)
    variables = {**environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    return VllmServer("the trio", str(trio_path("verifier")), words, port, folder, variables, fork_server)


def stop_trial(
    served: ServedTrio, name: str, expected: Sequence[Answer], stopped_for_s: float = STOPPED_FOR_S
) -> Trial:
    """Stops a process for a while in the middle of requests.

    Args:
        served: a server that drafts.
        name: of the process.
        expected: answers without drafts.
        stopped_for_s: seconds.
    """
    accepted = served.num_accepted()
    with served.asking() as answers:
        time.sleep(1.0)
        served.process(name).suspend()
        time.sleep(stopped_for_s)
        served.process(name).resume()
        found = [one.result() for one in answers]
    after = served.ask()
    accepted = served.num_accepted() - accepted
    faults = [*_differences(found, expected), *_differences(after, expected)]
    return Trial(
        f"SIGSTOP of the {name} for {stopped_for_s:.0f} s while {NUM_REQUESTS} requests run, then SIGCONT",
        "all answered with the same tokens, and those after them",
        f"{_num_equal(found, expected)} + {_num_equal(after, expected)} of {2 * NUM_REQUESTS} equal, "
        f"{accepted:.0f} drafts accepted",
        (*faults, *(["nothing was drafted"] if not accepted else [])),
    )


def kill_trial(fork_server: ForkServer, environment: Mapping[str, str], name: str, expected: Sequence[Answer]) -> Trial:
    """Kills a process in the middle of requests, of a plain server and of one that drafts."""
    outcomes = {drafts: _killed(fork_server, environment, drafts, name) for drafts in (False, True)}
    (plain, plain_left), (found, left) = outcomes[False], outcomes[True]
    faults = []
    if hanging := sum(one == "hang" for one in found):
        faults.append(f"{hanging} requests hang")
    if wrong := sum(not isinstance(one, str) and one != text for one, text in zip(found, expected, strict=True)):
        faults.append(f"{wrong} texts wrong")
    if more := set(left) - set(plain_left):
        faults.append(f"left over: {', '.join(sorted(more))}")
    said = ", ".join(sorted({one for one in found if isinstance(one, str)})) or "all answered"
    plainly = ", ".join(sorted({one for one in plain if isinstance(one, str)})) or "all answered"
    return Trial(
        f"SIGKILL of the {name} while {NUM_REQUESTS} requests run",
        "errors instead of hangs; no process and no file that a plain server does not leave",
        f"{said} (plain server: {plainly}); left: {', '.join(sorted(set(left))) or 'nothing'} (plain server: "
        f"{', '.join(sorted(set(plain_left))) or 'nothing'})",
        tuple(faults),
    )


def _killed(
    fork_server: ForkServer, environment: Mapping[str, str], drafts: bool, name: str
) -> tuple[list[Answer], list[str]]:
    """Starts a server, and does as `killed`."""
    with serving(fork_server, environment, drafts) as served:
        return killed(served, name)


def killed(served: ServedTrio, name: str) -> tuple[list[Answer], list[str]]:
    """Kills a process of a server in the middle of requests; their answers, and what is left of the server."""
    with served.asking() as answers:
        time.sleep(1.0)
        served.process(name).kill()
        found = [one.result() for one in answers]
    return found, served.left_over()


def _truncate(drafter: Path) -> None:
    weights = drafter / SINGLE_FILE
    os.truncate(weights, weights.stat().st_size // 2)


def _break_weights(drafter: Path) -> None:
    (drafter / SINGLE_FILE).write_bytes(b"not a checkpoint")


def _break_config(drafter: Path) -> None:
    (drafter / "config.json").write_text('{"architectures": ["Nemotron')


def _break_tokenizer(drafter: Path) -> None:
    (drafter / "tokenizer.json").write_text('{"model": ')


DAMAGES: Mapping[str, Damage] = {
    "its weights cut in half": _truncate,
    "no weights in it": lambda drafter: (drafter / SINGLE_FILE).unlink(),
    "another file in place of its weights": _break_weights,
    "missing": lambda drafter: shutil.rmtree(drafter),
    "its config.json cut off": _break_config,
    "its tokenizer.json cut off": _break_tokenizer,
}
# In lines of a log that are no mere information.
COMPLAINTS = ("Error: ", "WARNING", "ERROR")
# Said by vLLM when the verifier is loaded.
LOADED = "Loading weights took"


def start_trial(fork_server: ForkServer, environment: Mapping[str, str], name: str) -> Trial:
    """Starts a server whose drafter is damaged."""
    with TemporaryDirectory(prefix="serve-") as made:
        folder, drafter = Path(made) / "server", Path(made) / "drafter"
        folder.mkdir()
        shutil.copytree(trio_path("twotower"), drafter)
        DAMAGES[name](drafter)
        server = start(fork_server, environment, folder, drafter)
        try:
            server.wait_until_ready()
            started = True
        except ChildError:
            started = False
        finally:
            server.kill()
        log = server.log.read_text(errors="replace")
    said = [line for line in log.splitlines() if str(drafter) in line and any(one in line for one in COMPLAINTS)]
    sentences = list(dict.fromkeys(line.rpartition("Error: ")[2].rpartition("] ")[2].strip() for line in said))
    faults = []
    if started:
        faults += [] if len(sentences) == 1 else [f"served, with {len(sentences)} sentences in the log"]
    else:
        faults += ["refused when the verifier was loaded"] if LOADED in log else []
        faults += [] if sentences else ["refused without a sentence that names it"]
    return Trial(
        f"drafter at start: {name}",
        "refused with one sentence before anything is loaded, or served with one in the log",
        f"{'served' if started else 'refused'}: {sentences[-1] if sentences else ''}".replace(str(drafter), "DRAFTER"),
        tuple(faults),
    )


def full_disk_trial(fork_server: ForkServer, environment: Mapping[str, str], expected: Sequence[Answer]) -> Trial:
    """Fills the disk that a server has its log and temporary files on, while it serves."""
    what = "full disk under the log and the temporary files of a server that runs"
    must = "all answered with the same tokens, drafts go on and are counted"
    with (
        TemporaryDirectory(prefix="serve-") as name,
        mounted_disk(Path(name), f"size={DISK_BYTES}") as is_mounted,
    ):
        if not is_mounted:
            return Trial(what, must, reason="no disk can be mounted here")
        with serving_in(Path(name), fork_server, environment, drafts=True) as served:
            before = served.num_accepted()
            fill(Path(name))
            found = served.ask()
            accepted = served.num_accepted() - before
            left = shutil.disk_usage(name).free
    faults = _differences(found, expected) + ([] if accepted else ["nothing was drafted"])
    return Trial(
        what,
        must,
        f"{_num_equal(found, expected)} of {NUM_REQUESTS} equal, {accepted:.0f} drafts accepted, {left} bytes free",
        tuple(faults),
    )


def fill(folder: Path) -> None:
    """Writes until there is no room."""
    with suppress(OSError), (folder / "filling").open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass


def process_trials(fork_server: ForkServer, environment: Mapping[str, str]) -> Iterator[Trial]:
    """Stops and kills the processes of servers, and fills the disk of one."""
    with serving(fork_server, environment, drafts=False) as plain:
        expected: Any = plain.ask()
    with serving(fork_server, environment, drafts=True) as served:
        for name in (API_SERVER, ENGINE_CORE):
            yield stop_trial(served, name, expected)
    for name in (ENGINE_CORE, API_SERVER):
        yield kill_trial(fork_server, environment, name, expected)
    yield full_disk_trial(fork_server, environment, expected)


def start_trials(fork_server: ForkServer, environment: Mapping[str, str]) -> Iterator[Trial]:
    """Starts servers whose drafters are damaged."""
    for damage in DAMAGES:
        yield start_trial(fork_server, environment, damage)


def _num_equal(found: Sequence[Answer], expected: Sequence[Answer]) -> int:
    return sum(one == text for one, text in zip(found, expected, strict=True))


def _differences(found: Sequence[Answer], expected: Sequence[Answer]) -> list[str]:
    """Says how many answers are not as they must be."""
    lost = sum(isinstance(one, str) for one in found)
    wrong = len(found) - lost - _num_equal(found, expected)
    return [f"{lost} requests lost"] * bool(lost) + [f"{wrong} texts wrong"] * bool(wrong)
