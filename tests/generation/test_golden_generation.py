"""All generation cases of the published code, token for token, with NFE and the trace of every step."""

from typing import Any

import pytest

from tests.support.golden_files import NAMES, generation_cases, generation_options, golden_model

CASES = [(name, index) for name in NAMES for index in range(len(generation_cases(name)))]


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
