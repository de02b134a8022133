"""All generation cases of the published code, token for token, with NFE and the trace of every step."""

from collections.abc import Sequence
from typing import Any

import pytest

from tests.support.golden_files import NAMES, generation_cases, generation_options, golden_model
from twotower_spec.generation.denoising import DenoisedBlocks, DenoisingRequest, ScheduleLoop, StepObserver

CASES = [(name, index) for name in NAMES for index in range(len(generation_cases(name)))]

DIFFUSION = [one for one in CASES if generation_cases(one[0])[one[1]]["mode"] == "generate_mask_diffusion"]


def generate(name: str, dtype: str, case: dict[str, Any], prompts: list[list[int]]) -> Any:
    options = generation_options(case)
    if case["mode"] == "generate_mask_diffusion":
        options["return_traces"] = True
    return getattr(golden_model(name, dtype), case["mode"])(prompts, **options)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "index"), CASES)
def test_generation_equals_the_published_code_token_for_token(name: str, index: int, dtype: str) -> None:
    case = generation_cases(name)[index]
    result = generate(name, dtype, case, [case["prompt"]])
    assert result.sequences == [case["output"]]
    if "nfe" in case:
        assert result.num_denoiser_passes == [case["nfe"]]
        trace = result.traces[0]
        assert [block.xt for block in trace] == [block["xt"] for block in case["blocks"]]
        assert [block.commits for block in trace] == [block["commits"] for block in case["blocks"]]
        assert [block.t for block in trace] == [pytest.approx(block["t"]) for block in case["blocks"]]


class FixedShapes(ScheduleLoop):
    """The loop that a device runs ahead of its host, in the place of the one that shows its steps."""

    def denoise(self, request: DenoisingRequest, observers: Sequence[StepObserver] = ()) -> DenoisedBlocks:
        return super().denoise(request)


@pytest.mark.parametrize(("name", "index"), DIFFUSION)
def test_the_loop_of_fixed_shapes_equals_the_published_code(
    name: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = generation_cases(name)[index]
    monkeypatch.setattr("twotower_spec.generation.batch.HostLoop", FixedShapes)
    result = golden_model(name, "float32").generate_mask_diffusion([case["prompt"]], **generation_options(case))
    assert result.sequences == [case["output"]]
    assert result.num_denoiser_passes == [case["nfe"]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["generate_ar", "generate_mock_ar", "generate_mask_diffusion"])
def test_ragged_batch_of_golden_prompts_equals_the_single_runs(name: str, mode: str) -> None:
    groups: dict[str, list[dict[str, Any]]] = {}
    for case in generation_cases(name):
        if case["mode"] == mode:
            groups.setdefault(str(generation_options(case)), []).append(case)
    batches = [cases for cases in groups.values() if len(cases) > 1]
    assert batches
    for cases in batches:
        result = generate(name, "float64", cases[0], [case["prompt"] for case in cases])
        assert result.sequences == [case["output"] for case in cases]
        if "nfe" in cases[0]:
            assert result.num_denoiser_passes == [case["nfe"] for case in cases]
