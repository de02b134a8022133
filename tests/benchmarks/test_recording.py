"""Records of a scheduler's steps, which are made by hand."""

from types import SimpleNamespace
from typing import Any

import pytest

from twotower_bench.engines.recording import StepRecorder


class Scheduler:
    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.seen: list[Any] = []

    def update_from_output(self, scheduled: Any, output: Any) -> str:
        self.seen.append(scheduled)
        return "stock"


def step(scheduler: Scheduler, **requests: tuple[int, int, int]) -> Any:
    """A step by request: tokens read, drafts among them, tokens sampled."""
    ids = {f"{name[1:]}-ab12": numbers for name, numbers in requests.items()}
    for request_id in ids:
        scheduler.requests.setdefault(request_id, SimpleNamespace(is_finished=lambda: False))
    scheduled = SimpleNamespace(
        num_scheduled_tokens={request_id: read for request_id, (read, _, _) in ids.items()},
        scheduled_spec_decode_tokens={request_id: [0] * drafts for request_id, (_, drafts, _) in ids.items() if drafts},
        num_invalid_spec_tokens=None,
    )
    output = SimpleNamespace(
        req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
        sampled_token_ids=[[0] * sampled for _, _, sampled in ids.values()],
    )
    return scheduler.update_from_output(scheduled, output)


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler()


@pytest.fixture
def recorder(scheduler: Scheduler) -> StepRecorder:
    return StepRecorder(scheduler)


def test_steps_of_a_request_begin_after_its_prompt(scheduler: Scheduler, recorder: StepRecorder) -> None:
    assert step(scheduler, r1=(5, 0, 0)) == "stock" and len(scheduler.seen) == 1
    step(scheduler, r1=(3, 0, 1))
    step(scheduler, r1=(5, 4, 3))
    step(scheduler, r1=(1, 0, 1))
    assert recorder.steps_of("1") == ((4, 0), (2, 0))
    assert recorder.steps_of("2") == ((), ())


def test_shapes_are_of_steps_in_which_nobody_reads_a_prompt_and_all_read_as_much(
    scheduler: Scheduler, recorder: StepRecorder
) -> None:
    step(scheduler, r1=(5, 0, 1), r2=(7, 0, 1))
    step(scheduler, r1=(3, 2, 2), r2=(3, 2, 1))
    step(scheduler, r1=(3, 2, 2), r2=(2, 1, 1))
    step(scheduler, r1=(1, 0, 1), r3=(1, 0, 1))
    assert [(one.num_reqs, one.num_tokens, len(one.seconds)) for one in recorder.decoding_steps()] == [(2, 3, 1)]
    assert recorder.drafting() is None and recorder.decoding_steps()[0].drafting_s == {}


def test_a_step_of_a_request_that_is_over_does_not_count(scheduler: Scheduler, recorder: StepRecorder) -> None:
    """With asynchronous scheduling vLLM has scheduled one step more when it sees the end."""
    step(scheduler, r1=(5, 0, 1))
    step(scheduler, r1=(5, 4, 2))
    scheduler.requests["1-ab12"] = SimpleNamespace(is_finished=lambda: True)
    step(scheduler, r1=(5, 4, 5))
    del scheduler.requests["1-ab12"]
    before = recorder.steps_of("1")
    assert before == ((4,), (1,))


def test_begin_forgets_what_was_before(scheduler: Scheduler, recorder: StepRecorder) -> None:
    step(scheduler, r1=(5, 0, 1))
    step(scheduler, r1=(1, 0, 1))
    recorder.begin()
    assert recorder.steps_of("1") == ((), ()) and recorder.decoding_steps() == ()
