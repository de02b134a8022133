"""Section of `bench standalone`: mask diffusion by the model alone, its speed and its fidelity to AR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from twotower_bench.pareto import pareto_front
from twotower_bench.report.columns import Column, estimate, number, over_gamma, rate, share, table, times
from twotower_bench.report.document import Plot, Section, Table
from twotower_bench.report.plots import FRONT, Point, line_panels, stacked_bars
from twotower_bench.report.reading import Measurements
from twotower_spec.errors import ArgumentError
from twotower_spec.evaluation.standalone import AR, BASELINES, Cell, Score, Summary, summarise

DIFFUSION = "mask-diffusion"
HUES = {FRONT: 6, DIFFUSION: 1, "ar": 0, "mock-ar": 2, "self-speculative": 3}
MOST_BARS = 14
# Phases of a text with their hues.
PHASES = {"prefill": 4, "denoise": 2, "extend": 1}

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
            _table(summaries, front, measured.scores),
            *(over_gamma(name, COLUMNS[name], by_setting) for name in ("Of AR", "Same text")),
        ],
        [_fidelity_plot(summaries, front), _phase_plot(measured.cells, front)],
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


def _table(summaries: Sequence[Summary], front: Sequence[Summary], scores: Sequence[Score]) -> Table:
    found = {(f"{one.score.task} {one.score.metric}", one.setting): one.score for one in scores}

    def score(name: str, one: Summary) -> str:
        if (own := found.get((name, one.setting))) is None:
            return ""
        return number(own.value, 3) + ("" if own.standard_error is None else f" ± {own.standard_error:.3f}")

    def heading(one: Summary) -> str:
        return "Baselines" if one.setting in BASELINES else "Mask diffusion, fastest first"

    columns = {
        "Setting": Column(lambda one: one.setting.label),
        "Pareto": Column(lambda one: "front" if one in front else "", "nothing is both faster and more often the same"),
        **COLUMNS,
        **{name: Column(partial(score, name)) for name, _ in found},
    }
    ranked = sorted(summaries, key=lambda one: 0 if one.setting in BASELINES else 1 / one.speed_up)
    return table("Speed and fidelity", ranked, columns, heading)


def _fidelity_plot(summaries: Sequence[Summary], front: Sequence[Summary]) -> Plot:
    modes = dict.fromkeys(one.setting.mode for one in summaries)
    points = [
        Point("", label, one.speed_up, one.identical.value)
        for label, one in (*((FRONT, one) for one in front), *((one.setting.mode, one) for one in summaries))
    ]
    caption = (
        "Every setting: speed over AR in the same repeat, and how often the text is AR's to the token. Up and to the "
        "right is better; the line joins what nothing beats in both."
    )
    panels = line_panels(points, HUES, "speed, AR = 1", "share of texts that are AR's", modes)
    return Plot("fidelity", "Speed against fidelity", caption, panels)


def _phase_plot(cells: Sequence[Cell], front: Sequence[Summary]) -> Plot:
    """Milliseconds per token by phase: baselines, and the front."""
    settings = dict.fromkeys([*BASELINES, *(one.setting for one in reversed(front))])
    found = {how: own for how in settings if (own := [cell for cell in cells if cell.setting == how])}
    shown = dict(list(found.items())[:MOST_BARS])

    def per_token(phase: str, own: Sequence[Cell]) -> float:
        return 1e3 * sum(cell.phase_seconds.get(phase, 0.0) for cell in own) / sum(cell.num_tokens for cell in own)

    layers = {phase: [per_token(phase, own) for own in shown.values()] for phase in PHASES}
    names = [setting.label.replace("mask-diffusion ", "") for setting in shown]
    caption = (
        "Of the baselines and the Pareto front, over all repeats. Shorter is better; the longest part of a bar is what "
        "there is to gain."
    )
    panels = [stacked_bars(names, layers, PHASES.values(), "milliseconds per token")]
    return Plot("phases", "Time per token by phase", caption, panels)
