"""Cells of the matrix, what is seen of an engine in one, and whether that is what must hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["exception", "NaN", "out of memory", "hang", "wrong shape", "damaged state", "full pool"]
When = Literal["before", "during", "after"]
KINDS: tuple[Kind, ...] = (
    "exception",
    "NaN",
    "out of memory",
    "hang",
    "wrong shape",
    "damaged state",
    "full pool",
)
WHENS: tuple[When, ...] = ("before", "during", "after")
# What a sentence in the log must have: what happened, then what to do about it.
REMEDY = ";"


@dataclass(frozen=True)
class Cell:
    """One fault.

    Attributes:
        runner: of vLLM, "V1" or "V2".
        stage: of a round, see `stages`.
        kind: of fault.
        when: "before" a load, from its first round to its last; "during" it, in every other round for a while; or
            "after" one, while the engine is idle and in the first rounds of the next.
    """

    runner: str
    stage: str
    kind: str
    when: str

    @property
    def most_sentences(self) -> int:
        """How many sentences it may cost in the log: one for each way in which it shows.

        A reset has that of the round from which there is something to recover, and its own. A wrong shape is noticed
        where drafts are handed out or, by another error, where they are settled.
        """
        return 2 if self.stage == "reset" or self.kind == "wrong shape" else 1


@dataclass(frozen=True)
class Seen:
    """Behaviour of an engine under a fault and after it.

    Attributes:
        cell: the fault.
        num_fired: calls that failed.
        num_requests: that were asked, under the fault and after it.
        num_answered: of them, that came to an end by themselves.
        num_equal: of them, with the tokens of an engine without drafts, all at temperature 0.
        num_accepted_after: drafts that were accepted when the fault was gone.
        num_steps_back: steps of the engine after the fault until a draft was accepted.
        counted: requests without drafts and steps without our sampler, by reason.
        sentences: errors and warnings in the log.
        reason: of a cell that makes no sense; nothing was run then.
    """

    cell: Cell
    num_fired: int = 0
    num_requests: int = 0
    num_answered: int = 0
    num_equal: int = 0
    num_accepted_after: int = 0
    num_steps_back: int = 0
    counted: dict[str, int] = field(default_factory=dict)
    sentences: tuple[str, ...] = ()
    reason: str = ""

    @property
    def faults(self) -> list[str]:
        """Sentences on all that does not hold; empty for a cell that is right."""
        if self.reason:
            return []
        found = []
        if not self.num_fired:
            found.append("the fault was never there")
        if self.num_answered != self.num_requests:
            found.append(f"{self.num_requests - self.num_answered} of {self.num_requests} requests lost")
        if self.num_equal != self.num_answered:
            found.append(f"{self.num_answered - self.num_equal} of {self.num_answered} texts wrong")
        if not self.num_accepted_after:
            found.append("no draft was accepted afterwards")
        if len(self.sentences) > self.cell.most_sentences:
            found.append(f"{len(self.sentences)} sentences in the log")
        found += [f"no remedy in: {one}" for one in self.sentences if REMEDY not in one]
        if self.cell.kind in ("exception", "out of memory") and not self.sentences:
            found.append("nothing in the log")
        return found

    @property
    def outcome(self) -> Literal["held", "failed", "n/a"]:
        """Whether all that must hold did."""
        return "n/a" if self.reason else "failed" if self.faults else "held"
