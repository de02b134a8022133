"""Section of `bench standalone`: mask diffusion by the model alone, its speed and its fidelity to AR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from twotower_bench.pareto import pareto_front
from twotower_bench.report.columns import Column, estimate, number, over_gamma, rate, share, table, times
from twotower_bench.report.document import Plot, Section, Table
from twotower_bench.report.plots import draw, new_axes
from twotower_bench.report.reading import Measurements
from twotower_spec.errors import ArgumentError
from twotower_spec.evaluation.standalone import AR, BASELINES, Cell, Summary, summarise
from twotower_spec.evaluation.statistics import Estimate

DIFFUSION = "mask-diffusion"
FRONT = "Pareto front"
HUES = {FRONT: 6, DIFFUSION: 1, "ar": 0, "mock-ar": 2, "self-speculative": 3}
COLUMNS: Mapping[str, Column] = {
    "Tokens/s": Column(lambda one: estimate(one.tokens_per_s, rate), "median of the repeats (quartiles)"),
    "Of AR": Column(lambda one: "" if one.setting == AR else times(one.speed_up)),
    "Tokens / NFE": Column(lambda one: estimate(one.tokens_per_nfe), "per denoiser pass; intervals: 95 % over prompts"),
    "Tokens / context pass": Column(lambda one: estimate(one.tokens_per_context_pass)),
    "Same text": Column(lambda one: estimate(one.identical, share), "share of prompts whose text is AR's to the token"),
    "Common prefix": Column(lambda one: number(one.common_prefix.value, 1), "leading tokens that are AR's"),
    "Length": Column(lambda one: number(one.length, 1)),
}


def standalone_section(measured: Measurements) -> Section:
    """Makes the section of cells and scores of the model alone.

    Raises:
        ArgumentError: AR was not measured in any repeat with others, and all is compared with it.
    """
    summaries = summarise(measured.cells)
    if not summaries:
        raise ArgumentError(f"{measured.source} has no cell of AR, which all is compared with; let its run finish")
    front = [summaries[i] for i in pareto_front([(one.speed_up, one.identical.value) for one in summaries])]
    by_setting = [
        ("", f"S={how.block_size} steps={how.steps_per_block}", how.confidence_threshold, one)
        for one in summaries
        if (how := one.setting).mode == DIFFUSION
    ]
    repeats = 1 + max(cell.repeat for cell in measured.cells)
    return Section(
        "The model alone",
        _finding(summaries),
        [f"Greedy, one prompt at a time, {repeats} repeats. AR is the context tower's own text."],
        [
            _table(summaries, front, measured),
            *(over_gamma(name, COLUMNS[name], by_setting) for name in ("Of AR", "Same text")),
        ],
        _plot(summaries, front),
        [*summaries, *measured.scores],
    )


def _finding(summaries: Sequence[Summary]) -> str:
    diffusion = [one for one in summaries if one.setting.mode == DIFFUSION]
    if not diffusion:
        return "Mask diffusion was not measured."
    fastest = max(diffusion, key=lambda one: one.speed_up)
    truest = max(diffusion, key=lambda one: (one.identical.value, one.speed_up))
    text = (
        f"Mask diffusion alone is at best {number(fastest.speed_up, 1)} times as fast as AR ({fastest.setting.label}), "
        f"with {share(fastest.identical.value)} of the texts AR's to the token"
    )
    if truest is not fastest:
        text += (
            f"; most faithful is {truest.setting.label}: {share(truest.identical.value)} at {times(truest.speed_up)}"
        )
    own = next((one for one in summaries if one.setting.mode == "self-speculative"), None)
    return text + (f". Self-speculation reaches {times(own.speed_up)}." if own else ".")


def _table(summaries: Sequence[Summary], front: Sequence[Summary], measured: Measurements) -> Table:
    found = {(f"{one.score.task} {one.score.metric}", one.setting): one.score for one in measured.scores}

    def score(name: str, one: Summary) -> str:
        if (own := found.get((name, one.setting))) is None:
            return ""
        return number(own.value, 3) + ("" if own.standard_error is None else f" ± {own.standard_error:.3f}")

    columns = {
        "Setting": Column(lambda one: one.setting.label),
        "Pareto": Column(lambda one: "front" if one in front else "", "nothing is both faster and more often the same"),
        **COLUMNS,
        **{f"{phase} ms".capitalize(): _phase(phase, measured.cells) for phase in ("prefill", "denoise", "extend")},
        **{name: Column(partial(score, name)) for name, _ in found},
    }
    ranked = sorted(summaries, key=lambda one: 0 if one.setting in BASELINES else 1 / one.speed_up)
    return table("Speed and fidelity", ranked, columns, _heading)


def _heading(one: Summary) -> str:
    return "Baselines" if one.setting in BASELINES else "Mask diffusion, fastest first"


def _phase(name: str, cells: Sequence[Cell]) -> Column:
    """Milliseconds per token that a phase takes, over all repeats."""

    def text(one: Summary) -> str:
        own = [cell for cell in cells if cell.setting == one.setting]
        seconds = sum(cell.phase_seconds.get(name, 0.0) for cell in own)
        return number(1e3 * seconds / sum(cell.num_tokens for cell in own))

    return Column(text, "per token, over all repeats" if name == "prefill" else "")


def _plot(summaries: Sequence[Summary], front: Sequence[Summary]) -> Plot:
    axes = new_axes("", "speed, AR = 1", "share of texts that are AR's")
    lines: dict[str, list[Summary]] = {FRONT: list(front)}
    for one in summaries:
        lines.setdefault(one.setting.mode, []).append(one)
    for name, own in lines.items():
        shares = [one.identical.value for one in own]
        points = [(one.speed_up, Estimate(y, y, y)) for one, y in zip(own, shares, strict=True)]
        draw(axes, name, HUES[name], points, is_joined=name == FRONT)
    caption = (
        "Every setting: speed over AR in the same repeat, and how often the text is AR's to the token. Up and to the "
        "right is better; the line joins what nothing beats in both."
    )
    return Plot("Speed against fidelity", caption, [axes])
