import json
import os
from pathlib import Path

import pytest
import torch

from tests.support.builders import tiny_config
from tests.support.command_line import Command
from twotower_bench.drafter_size import PUBLISHED_SIZE, weight_bytes_of_pass
from twotower_bench.towers import DeviceClock, FilledPool, PassShape, first_layers, measure, planned, profiled
from twotower_bench.towers.capture import captured
from twotower_bench.towers.measuring import visited_experts, weight_bytes_read
from twotower_spec import TwoTowerModel
from twotower_spec.state import ContextState

CPU = torch.device("cpu")
CONTEXT, REQUESTS = 5, 3
COMMAND = ("bench", "towers", "--layers", 6, "--requests", "2,1", "-S", "4", "--new-tokens", "1", "--context-tokens", 3)


@pytest.fixture(scope="module")
def model() -> TwoTowerModel:
    return TwoTowerModel.from_config(tiny_config(), dtype="float64")


@pytest.fixture(scope="module")
def pool(model: TwoTowerModel) -> FilledPool:
    return FilledPool(model, REQUESTS, CONTEXT, 6)


@pytest.fixture(scope="module")
def clock() -> DeviceClock:
    return DeviceClock.of(CPU, 1 << 20)


def extended(pool: FilledPool, num_tokens: int) -> ContextState:
    """A pool of its own in which the same contexts were read, and `num_tokens` more."""
    state = ContextState.for_towers(pool.towers, REQUESTS, 4 * REQUESTS)
    tokens = pool.token_ids[:, : CONTEXT + num_tokens].tolist()
    state.extend(pool.towers.context, dict(enumerate(tokens)))
    return state


def test_step_is_one_pass_of_the_denoiser_behind_the_contexts(pool: FilledPool, model: TwoTowerModel) -> None:
    step = pool.tower_pass(PassShape("step", REQUESTS, 6))
    block = pool.token_ids[:, CONTEXT : CONTEXT + 6]
    context = extended(pool, 0).block_context(list(range(REQUESTS)), 6)
    with torch.inference_mode():
        logits = step.call()
        expected = model.denoiser.step(block, context, torch.ones(REQUESTS, dtype=torch.float64))
    torch.testing.assert_close(logits, expected.flatten(0, 1))


def test_extension_reads_the_same_tokens_again_and_again(pool: FilledPool, model: TwoTowerModel) -> None:
    extension = pool.tower_pass(PassShape("extension", 2, 3))
    for _ in range(2):
        logits, num_new = extension.call()  # type: ignore[misc]
        assert num_new.tolist() == [3, 3] and logits.shape == (2, model.config.vocab_size)
    fresh = FilledPool(model, REQUESTS, CONTEXT, 6).tower_pass(PassShape("extension", 2, 3))
    logits, _ = fresh.call()  # type: ignore[misc]
    state, tokens = extended(pool, 0), pool.token_ids[:2, CONTEXT : CONTEXT + 3].tolist()
    torch.testing.assert_close(logits, state.extend(model.context, dict(enumerate(tokens))).logits)


def test_bytes_are_those_of_visited_experts_and_of_everything_else(model: TwoTowerModel) -> None:
    config, tower = model.config, model.denoiser
    num_experts = {layer: config.n_routed_experts for layer, kind in enumerate(config.layer_kinds) if kind == "E"}
    everything = weight_bytes_read(tower, num_experts)
    of_one_expert = 2 * config.hidden_size * config.moe_intermediate_size * 8
    for visited in (0, 4):
        fewer = weight_bytes_read(tower, dict.fromkeys(num_experts, visited))
        assert everything - fewer == len(num_experts) * (config.n_routed_experts - visited) * of_one_expert
    # The estimate knows matrices alone; with a million tokens every expert is visited.
    assert everything == pytest.approx(weight_bytes_of_pass(config, 1e6, with_head=True, itemsize=8), rel=0.05)


def test_visited_experts_are_counted_layer_by_layer(pool: FilledPool, model: TwoTowerModel) -> None:
    config = model.config
    of_one_token = visited_experts(pool.tower_pass(PassShape("extension", 1, 1)))
    assert of_one_token == {1: config.num_experts_per_tok, 6: config.num_experts_per_tok}
    of_many = visited_experts(pool.tower_pass(PassShape("step", REQUESTS, 6)))
    assert all(config.num_experts_per_tok < count <= config.n_routed_experts for count in of_many.values())


def test_parts_and_graph_stand_beside_the_whole(pool: FilledPool, clock: DeviceClock, model: TwoTowerModel) -> None:
    found = measure(pool.tower_pass(PassShape("step", 1, 4)), clock, model.config, CONTEXT)
    assert set(found.parts_s) == {"Mamba", "experts", "attention", "MLP", "head, rest"}
    assert all(seconds > 0 for seconds in found.parts_s.values())
    assert 0 < found.host_s <= found.eager_s
    assert found.graph_s is None and found.no_graph == "graphs are of CUDA devices"
    assert found.floor_s == found.num_bytes / clock.bytes_per_s
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.denoiser.modules())


def test_profile_begins_with_what_takes_longest(pool: FilledPool) -> None:
    times = profiled(pool.tower_pass(PassShape("step", 1, 4)).call, CPU)
    assert any("mm" in one.name and one.num_calls for one in times)
    assert [one.seconds for one in times] == sorted((one.seconds for one in times), reverse=True)


def test_few_requests_and_large_blocks_come_first() -> None:
    assert list(map(str, planned([8, 1], [4, 16, 4], [5, 1])))[:5] == [
        "step, 1 x 16",
        "step, 1 x 4",
        "extension, 1 x 1",
        "extension, 1 x 5",
        "step, 8 x 16",
    ]


def test_first_layers_are_those_of_the_published_pattern() -> None:
    config = first_layers(PUBLISHED_SIZE, 7)
    assert config.layer_kinds == "MEMEM*E" and config.hidden_size == PUBLISHED_SIZE.hidden_size


def test_command_measures_each_pass_once(command: Command, tmp_path: Path) -> None:
    file, profile = tmp_path / "towers.jsonl", tmp_path / "profile.json"
    code, out, err = command(*COMMAND, "--json", file, "--profile", profile)
    assert code == 0, err
    lines = [line.split()[:2] for line in out.splitlines()]
    assert lines.count(["step,", "4"]) >= 2 and lines.count(["extension,", "1"]) >= 2
    assert "small geometry, 6 layers, float32, 3 tokens of context" in out
    rows = file.read_text().splitlines()
    assert [json.loads(row)["shape"]["num_reqs"] for row in rows] == [1, 1, 2, 2]
    assert json.loads(profile.read_text())[0]["seconds"] > 0
    code, again, _ = command(*COMMAND, "--json", file)
    assert code == 0 and again == out and file.read_text().splitlines() == rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layers", "53"), "--layers 53 is not allowed; give an integer from 1 to 52"),
        (("--size", "huge"), "--size 'huge' is not there; give one of published, small"),
        (("--requests", "0"), "--requests 0 is not allowed; give an integer from 1 to 1024"),
        (("--device", "meta"), "--device meta computes nothing; give cpu, cuda or cuda:N"),
        (("--dtype", "int8"), "dtype 'int8' is not allowed"),
    ],
)
def test_what_cannot_be_measured_is_refused(command: Command, options: tuple[str, ...], message: str) -> None:
    code, out, err = command("bench", "towers", *options)
    assert code == 2 and out == "" and message in err


@pytest.mark.skipif(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") > 5e11, reason="this machine has room")
def test_towers_larger_than_the_memory_are_refused_before_they_are_made(command: Command) -> None:
    options = ("--device", "cpu", "--size", "published", "--layers", 52, "--dtype", "float64")
    code, _, err = command("bench", "towers", *options)
    assert code == 2 and "52 layers of both towers take 505" in err and "give fewer with --layers" in err


@pytest.mark.gpu
def test_graph_of_a_pass_gives_its_logits() -> None:
    device = torch.device("cuda:0")
    model = TwoTowerModel.from_config(tiny_config(), dtype="bfloat16", context_device=device)
    step = FilledPool(model, 2, CONTEXT, 6).tower_pass(PassShape("step", 2, 6))
    with torch.inference_mode():
        replay = captured(step.call)
        replay()
    found = measure(step, DeviceClock.of(device), model.config, CONTEXT)
    assert found.graph_s is not None and found.no_graph == ""
