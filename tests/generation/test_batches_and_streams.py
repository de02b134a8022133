"""Guarantees to callers about batches, streams, samples, callbacks and refusals."""

import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from scipy import stats

from tests.support.builders import random_ids, tiny_config, tiny_model
from twotower_spec import ArgumentError, CommittedBlock, DiffusionConfig, GenerationResult, TwoTowerModel
from twotower_spec.state import ContextState

MODES = ("ar", "mock_ar", "mask_diffusion")
PROMPTS = [random_ids(5), random_ids(17, seed=1), random_ids(1, seed=2), random_ids(33, seed=3)]
BLOCKS = {"block_size": 5, "steps_per_block": 3, "confidence_threshold": 0.15}
every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture
def model() -> TwoTowerModel:
    return tiny_model()


def generate(model: TwoTowerModel, mode: str, prompts: list[list[int]], **options: Any) -> GenerationResult:
    blocks = BLOCKS if mode == "mask_diffusion" else {}
    result: GenerationResult = getattr(model, f"generate_{mode}")(
        prompts, **{"max_new_tokens": 12, **blocks, **options}
    )
    return result


def stream(model: TwoTowerModel, mode: str, **options: Any) -> list[CommittedBlock]:
    if mode == "mask_diffusion":
        options["config"] = DiffusionConfig(**BLOCKS, temperature=options.pop("temperature", 0.0))
    return list(getattr(model, f"stream_{mode}")(PROMPTS, max_new_tokens=12, **options))


@every_mode
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stream_yields_what_the_call_returns(model: TwoTowerModel, mode: str, temperature: float) -> None:
    options = {"temperature": temperature, "seed": 5, "eos_token_id": range(4, 12)}
    expected = generate(model, mode, PROMPTS, **options)
    blocks = stream(model, mode, **options)
    for row in range(len(PROMPTS)):
        mine = [block for block in blocks if block.row == row]
        assert [token for block in mine for token in block.token_ids] == expected.token_ids[row]
        assert sum(block.num_denoiser_passes for block in mine) == expected.num_denoiser_passes[row]
        assert [block.block_index for block in mine] == list(range(len(mine)))
        assert [block.finished for block in mine] == [False] * (len(mine) - 1) + [True]


@every_mode
def test_stream_of_no_tokens_is_empty(model: TwoTowerModel, mode: str) -> None:
    assert list(getattr(model, f"stream_{mode}")(PROMPTS, max_new_tokens=0)) == []


@every_mode
def test_stream_refuses_bad_arguments_before_it_is_read(model: TwoTowerModel, mode: str) -> None:
    with pytest.raises(ArgumentError, match="prompt 0 is empty"):
        getattr(model, f"stream_{mode}")([[]])


@every_mode
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_end_early_do_not_change_the_others(model: TwoTowerModel, mode: str, temperature: float) -> None:
    options = {"temperature": temperature, "seed": [3, 1, 4, 1], "max_new_tokens": 20}
    free = generate(model, mode, PROMPTS, **options).token_ids
    ends = {free[0][2], free[2][7]}
    stopped = generate(model, mode, PROMPTS, eos_token_id=ends, **options).token_ids
    assert len({len(row) for row in stopped}) > 1
    assert all(short == long[: len(short)] for short, long in zip(stopped, free, strict=True))


@every_mode
def test_one_end_token_is_as_good_as_a_list_of_it(model: TwoTowerModel, mode: str) -> None:
    end = generate(model, mode, PROMPTS).token_ids[0][4]
    one, several = (generate(model, mode, PROMPTS, eos_token_id=ids).token_ids for ids in (end, [end, end]))
    assert one == several


@every_mode
def test_end_token_in_the_prompt_does_not_end_the_row(model: TwoTowerModel, mode: str) -> None:
    frees = {token: generate(model, mode, [[token, 9, token]]).token_ids[0] for token in range(4, 16)}
    unused = next(token for token, free in frees.items() if token not in free)
    ended = generate(model, mode, [[unused, 9, unused]], eos_token_id=unused).token_ids[0]
    assert ended == frees[unused]


@every_mode
def test_sample_of_a_row_does_not_depend_on_its_batch(model: TwoTowerModel, mode: str) -> None:
    options = {"temperature": 1.3, "top_k": 20, "top_p": 0.95}
    seeds = [11, -5, 2**62, 11]
    together = generate(model, mode, PROMPTS, seed=seeds, **options).token_ids
    for row, prompt in enumerate(PROMPTS):
        assert generate(model, mode, [prompt], seed=seeds[row], **options).token_ids == [together[row]]


@every_mode
def test_equal_prompts_with_unequal_seeds_differ(model: TwoTowerModel, mode: str) -> None:
    rows = generate(model, mode, [PROMPTS[0]] * 4, temperature=1.0, seed=0).token_ids
    assert len({tuple(row) for row in rows}) == 4


@every_mode
def test_one_seed_counts_up_over_the_rows(model: TwoTowerModel, mode: str) -> None:
    one, each = (generate(model, mode, PROMPTS, temperature=1.0, seed=seed) for seed in (7, [7, 8, 9, 10]))
    assert one.token_ids == each.token_ids


def test_sampled_picks_of_a_block_follow_the_softmax(model: TwoTowerModel) -> None:
    # N and bound fixed beforehand: 4000 samples, p > 1e-4. Every token but the mask is expected at least 5 times.
    prompt, state = random_ids(6), ContextState(model.config, 1, 4, model.dtype)
    state.extend(model.context, {0: prompt})
    with torch.inference_mode():
        logits = model.denoiser.step(torch.tensor([[3]]), state.block_context([0], 1), torch.ones(1))[0, 0]
    logits = logits.clone().index_fill(0, torch.tensor([3]), -torch.inf)
    expected = torch.softmax(logits / 1.5, -1) * 4000
    tokens = model.generate_mask_diffusion(
        [prompt] * 4000, max_new_tokens=1, block_size=1, steps_per_block=1, temperature=1.5, seed=23
    ).token_ids
    counts = torch.tensor(tokens).flatten().bincount(minlength=61).double()
    others = torch.arange(61) != 3
    assert counts[3] == 0 and (expected[others] > 5).all()
    assert stats.chisquare(counts[others].numpy(), expected[others].numpy()).pvalue > 1e-4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_diffusion_never_leaves_or_picks_the_mask_token(model: TwoTowerModel, temperature: float) -> None:
    rows = generate(model, "mask_diffusion", PROMPTS, temperature=temperature, seed=0, max_new_tokens=30).token_ids
    assert all(3 not in row and len(row) == 30 for row in rows)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_traces_tell_how_each_block_filled_up(model: TwoTowerModel, temperature: float) -> None:
    options = {"temperature": temperature, "seed": 2, "max_new_tokens": 13}
    result = generate(model, "mask_diffusion", PROMPTS, return_traces=True, **options)
    assert result.traces is not None
    for row, traces in enumerate(result.traces):
        assert [token for trace in traces for token in trace.xt[-1]][:13] == result.token_ids[row]
        assert sum(len(trace.t) for trace in traces) == result.num_denoiser_passes[row]
        for trace in traces:
            masked = [xt.count(3) for xt in trace.xt]
            assert masked[0] == 5 and masked[-1] == 0 and sum(trace.commits) == 5
            assert trace.t == [count / 5 for count in masked[:-1]]
            assert trace.commits == [a - b for a, b in pairwise(masked)]
            for earlier, later in pairwise(trace.xt):
                assert all(b in (a, b) if a == 3 else a == b for a, b in zip(earlier, later, strict=True))


def test_traces_cost_nothing_unless_asked_for(model: TwoTowerModel) -> None:
    assert generate(model, "mask_diffusion", PROMPTS).traces is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_step_callback_changes_neither_tokens_nor_traces_of_a_ragged_batch(
    model: TwoTowerModel, temperature: float
) -> None:
    options = {"temperature": temperature, "seed": 2, "return_traces": True, "confidence_threshold": 0.1}
    plain = generate(model, "mask_diffusion", PROMPTS, **options)
    watched = generate(model, "mask_diffusion", PROMPTS, step_callback=lambda *args, **named: None, **options)
    assert watched.token_ids == plain.token_ids and watched.traces == plain.traces
    assert watched.num_denoiser_passes == plain.num_denoiser_passes


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_step_callback_is_shown_logits_with_the_mask_token(model: TwoTowerModel, temperature: float) -> None:
    seen: list[bool] = []

    def callback(step_idx: int, steps: int, xt: torch.Tensor, *, logits: torch.Tensor | None, **rest: Any) -> None:
        if logits is not None:
            seen.append(bool(torch.isfinite(logits).all()) and logits.shape == (*xt.shape, 61))

    generate(model, "mask_diffusion", PROMPTS, step_callback=callback, temperature=temperature, seed=0)
    assert seen and all(seen)


def test_autoregressive_rows_count_no_denoiser_pass(model: TwoTowerModel) -> None:
    result = generate(model, "ar", PROMPTS)
    assert result.num_denoiser_passes == [0] * 4 and result.tokens_per_denoiser_pass is None


def test_mock_ar_takes_one_denoiser_pass_per_token(model: TwoTowerModel) -> None:
    end = generate(model, "mock_ar", PROMPTS).token_ids[1][3]
    result = generate(model, "mock_ar", PROMPTS, eos_token_id=end)
    assert result.num_denoiser_passes == [len(row) for row in result.token_ids]


@every_mode
def test_state_of_the_last_tokens_is_not_computed(
    model: TwoTowerModel, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = ContextState.extend

    def counting(state: ContextState, tower: Any, increments: Any, *args: Any, **named: Any) -> Any:
        read.append(sum(map(len, increments.values())))
        return original(state, tower, increments, *args, **named)

    monkeypatch.setattr(ContextState, "extend", counting)
    generate(model, mode, [PROMPTS[1]], max_new_tokens=10)
    assert sum(read) == {"ar": 17 + 9, "mock_ar": 17 - 1 + 9, "mask_diffusion": 17 + 5}[mode]


@every_mode
def test_inputs_are_left_alone(model: TwoTowerModel, mode: str) -> None:
    prompts, tensor = [list(prompt) for prompt in PROMPTS], torch.tensor([PROMPTS[0]])
    generate(model, mode, prompts)
    getattr(model, f"generate_{mode}")(tensor, max_new_tokens=3)
    assert prompts == PROMPTS and tensor.tolist() == [PROMPTS[0]]


@every_mode
def test_weights_are_left_alone(model: TwoTowerModel, mode: str) -> None:
    before = [(name, tensor.clone()) for name, tensor in model.checkpoint_tensors()]
    generate(model, mode, PROMPTS, temperature=1.0)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(before, model.checkpoint_tensors(), strict=True))


@every_mode
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_models_generate_finite_tokens_in_every_mode(mode: str, dtype: str) -> None:
    rows = generate(tiny_model(dtype), mode, PROMPTS, temperature=0.7, seed=1).token_ids
    assert all(len(row) == 12 and all(0 <= token < 61 for token in row) for row in rows)


@every_mode
def test_towers_placed_on_the_cpu_generate_the_same(mode: str) -> None:
    model = TwoTowerModel.from_config(tiny_config(), dtype="float64")
    expected = generate(model, mode, PROMPTS).token_ids
    model.place_towers_on_devices("cpu", "cpu")
    assert generate(model, mode, PROMPTS).token_ids == expected


@pytest.mark.parametrize("devices", [("cuda:99", "cpu"), ("cpu", "cuda:99")])
def test_a_device_that_is_not_there_is_refused_and_nothing_moves(devices: tuple[str, str]) -> None:
    model = TwoTowerModel.from_config(tiny_config())
    with pytest.raises(ArgumentError, match="cuda:99"):
        model.place_towers_on_devices(*devices)
    assert model.context.device.type == model.denoiser.device.type == "cpu"


@pytest.mark.parametrize("mode", ["mock_ar", "mask_diffusion"])
def test_context_tower_alone_refuses_what_needs_the_denoiser(mode: str) -> None:
    alone = TwoTowerModel(tiny_config(), with_denoiser=False)
    with pytest.raises(ArgumentError, match='towers="context"'):
        generate(alone, mode, PROMPTS)


def test_context_tower_alone_generates_the_same(model: TwoTowerModel) -> None:
    alone = TwoTowerModel(tiny_config(), torch.float64, with_denoiser=False)
    alone.context.load_state_dict(model.context.state_dict())
    assert generate(alone, "ar", PROMPTS).token_ids == generate(model, "ar", PROMPTS).token_ids


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[5, True]], {}, "token id True"),
        ([[5, 6.0]], {}, "token id 6.0"),
        ([[5]], {"seed": [True]}, "seed True"),
        ([[5]], {"seed": 2**63}, "64-bit"),
        ([[5], [6]], {"seed": [1]}, "1 seeds were given for 2 prompts"),
        ([[5]], {"eos_token_id": [2, -1]}, "eos_token_id -1"),
        ([[5]], {"max_new_tokens": True}, "max_new_tokens True"),
        ([[5]], {"temperature": float("nan")}, "temperature nan"),
        ([[5]], {"temperature": float("inf")}, "temperature inf"),
        ([[5]], {"top_p": 1.5}, "top_p 1.5"),
    ],
)
def test_values_that_only_look_right_are_refused(
    model: TwoTowerModel, mode: str, prompts: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        generate(model, mode, prompts, **options)


def test_generating_does_not_import_vllm() -> None:
    code = (
        "import sys; from tests.support.builders import tiny_model; model = tiny_model(); "
        "model.generate_ar([5]), model.generate_mock_ar([5]), model.generate_mask_diffusion([5]); "
        "sys.exit(any(name.split('.')[0] in ('vllm', 'vllm_twotower') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
