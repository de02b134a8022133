"""Golden checkpoints on a device against the CPU: `python3 -m twotower_bench.gpu.goldens DEVICE FILE`.

Tokens are equal or they are not: in float32 without TF32 no decision of the golden cases is close
(tests/golden/README.md).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from twotower_bench.gpu.rows import RowFile
from twotower_spec import TwoTowerModel
from twotower_spec.drafting import AsyncRequest, AsyncSession, DraftingSession, DraftRequest, FixedPolicy
from twotower_spec.state.window import TokenTable

GOLDEN = Path(__file__).parents[3] / "tests" / "golden"
NAMES = ("T1", "T2")
OPTIONS = ("max_new_tokens", "eos_token_id", "block_size", "steps_per_block", "confidence_threshold", "mask_token_id")
# Of requests that are drafted for, and what their target then commits, round by round.
PROMPTS = ([17, 40, 9, 103, 77], [200, 31, 64], [11] * 20)
COMMITTED = ([[58], [90], [12]], [[33, 34, 35], [71], [8, 9]], [[6], [120, 7, 7, 19], [55]])
NUM_DRAFTS, MOST_PER_STEP = 8, 9

Tokens = list[list[int]]
Use = Callable[[TwoTowerModel], Tokens]


@dataclass(frozen=True)
class Outcome:
    """One way of using a model, on both.

    Attributes:
        model: name of the checkpoint.
        use: what was done.
        equal: whether tokens are.
        num_tokens: of the CPU.
        difference: the first one, or the error that there was instead of tokens; empty where there is none.
        seconds: on the device, compilation included.
    """

    model: str
    use: str
    equal: bool
    num_tokens: int
    difference: str
    seconds: float

    def __str__(self) -> str:
        what = f"{self.num_tokens} tokens equal" if self.equal else f"DIFFERENT: {self.difference}"
        return f"{self.model}, {self.use}: {what} ({self.seconds:.1f} s)"


def load(name: str, device: str = "cpu") -> TwoTowerModel:
    """Loads a golden checkpoint in float32."""
    return TwoTowerModel.from_pretrained(GOLDEN / name / "ckpt", dtype="float32", context_device=device, progress=False)


def uses_of(name: str) -> dict[str, Use]:
    """Ways of using a checkpoint, by what they are called: the published cases, and what this project adds."""
    uses: dict[str, Use] = {
        "self-speculative": _self_speculative,
        "drafts": drafts,
        "drafts ahead of the host": drafts_ahead,
    }
    cases = json.loads((GOLDEN / name / "generation.json").read_text(encoding="utf-8"))
    for number, case in enumerate(cases):
        size = f", block of {case['block_size']}, {case['steps_per_block']} steps" if "block_size" in case else ""
        label = f"case {number}, {case['mode']}, prompt of {len(case['prompt'])}, {case['max_new_tokens']} new{size}"
        uses[label] = _published(case)
    return uses


def compared(name: str, reference: TwoTowerModel, model: TwoTowerModel, uses: Mapping[str, Use]) -> Iterator[Outcome]:
    """Uses two models in all ways; what fails on the second one is different.

    Args:
        name: of the checkpoint.
        reference: on the CPU.
        model: on the device.
        uses: as of `uses_of`.
    """
    for label, use in uses.items():
        expected = use(reference)
        start = time.perf_counter()
        try:
            difference = first_difference(expected, use(model))
        except Exception as error:
            difference = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        seconds = time.perf_counter() - start
        yield Outcome(name, label, not difference, sum(map(len, expected)), difference, seconds)


def first_difference(expected: Tokens, found: Tokens) -> str:
    """Where two lists of rows differ first, in words; empty where they do not."""
    if len(expected) != len(found):
        return f"{len(found)} rows, expected {len(expected)}"
    for row, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
        if ours != theirs:
            place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
            if place is None:
                return f"row {row} has {len(theirs)} tokens, expected {len(ours)}"
            return f"row {row}, position {place}: {theirs[place]}, expected {ours[place]}"
    return ""


def _published(case: Mapping[str, Any]) -> Use:
    options = {name: case[name] for name in OPTIONS if name in case}

    def generate(model: TwoTowerModel) -> Tokens:
        found: Tokens = getattr(model, case["mode"])([case["prompt"]], **options).sequences
        return found

    return generate


def _self_speculative(model: TwoTowerModel) -> Tokens:
    return model.generate_self_speculative([*PROMPTS], max_new_tokens=16, block_size=8).sequences


def drafts(model: TwoTowerModel) -> Tokens:
    """Drafts of a session, of all rounds one behind the other."""
    session = DraftingSession(model, FixedPolicy(NUM_DRAFTS, 1), num_slots=3, num_tokens=256)
    rows = [list(prompt) for prompt in PROMPTS]
    found: Tokens = []
    for new in COMMITTED:
        for row, tokens in zip(rows, new, strict=True):
            row += tokens
        block = session.draft([DraftRequest(name, row) for name, row in enumerate(rows)]).block
        found += [block.row(row) for row in range(len(rows))]
    return found


def drafts_ahead(model: TwoTowerModel) -> Tokens:
    """Drafts of a session whose host learns of tokens a round later."""
    session = AsyncSession(model, FixedPolicy(NUM_DRAFTS, 1), num_slots=3, num_tokens=256, most_per_step=MOST_PER_STEP)
    device = model.context.device
    rows, known = [list(prompt) for prompt in PROMPTS], [list(prompt) for prompt in PROMPTS]
    found: Tokens = []
    for new in COMMITTED:
        for row, tokens in zip(rows, new, strict=True):
            row += tokens
        padded = torch.tensor([row + [0] * (128 - len(row)) for row in rows], dtype=torch.int32)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
        requests = [AsyncRequest(name, name, tokens, len(tokens) + MOST_PER_STEP) for name, tokens in enumerate(known)]
        done = session.draft_ahead(requests, TokenTable(padded.to(device), lengths.to(device)))
        known = [list(row) for row in rows]
        block = session.settle(done, dict(enumerate(known))).block
        found += [block.row(row) for row in range(len(rows))]
    return found


def main(device: str, file: str) -> int:
    """Compares both checkpoints; the exit code is 1 where tokens differ."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rows, num_different = RowFile(Path(file)), 0
    for name in NAMES:
        for outcome in compared(name, load(name), load(name, device), uses_of(name)):
            rows.add(str(outcome), device=device, **asdict(outcome))
            num_different += not outcome.equal
    print(f"{num_different} different" if num_different else f"all equal on {device}", flush=True)
    return int(num_different > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
