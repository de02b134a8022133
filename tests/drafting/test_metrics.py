"""Figures of a run, counted by hand."""

import json

import pytest

from twotower_spec.drafting import DraftingMetrics


def counted() -> DraftingMetrics:
    metrics = DraftingMetrics(extend_s=0.5, denoise_s=0.25, verify_s=1.0)
    metrics.add_round(3, 3, 4, [0.95, 0.9, 0.2], 2, 1)
    metrics.add_round(3, 1, 2, [0.95, 0.5, 0.9], 1, 1)
    metrics.add_round(2, 0, 1, [0.1, 0.9], 1, 1)
    metrics.add_round(0, 0, 1, [], 0, 0)
    return metrics


def test_figures_are_those_counted_by_hand() -> None:
    report = counted().summary()
    assert (report.num_rounds, report.num_tokens, report.acceptance_length) == (4, 8, 2.0)
    assert (report.num_draft_tokens, report.num_accepted_tokens) == (8, 4)
    assert report.acceptance_by_position == [2 / 4, 1 / 4, 1 / 4]
    assert report.conditional_acceptance_by_position == [2 / 3, 1 / 2, 1 / 1]
    assert report.histogram == [2, 1, 0, 1]
    assert (report.num_denoiser_passes, report.tokens_per_denoiser_pass) == (4, 2.0)
    assert (report.num_context_passes, report.context_passes_per_token) == (3, 3 / 8)
    assert (report.extend_s, report.denoise_s, report.verify_s) == (0.5, 0.25, 1.0)


def test_calibration_counts_drafts_that_were_decided_on() -> None:
    bins = counted().summary().calibration
    by_low = {round(b.low, 1): b for b in bins}
    assert sum(b.num_drafts for b in bins) == 6  # no position after a rejection is decided
    assert by_low[0.9].num_drafts == 3 and by_low[0.9].acceptance_rate == 1.0
    assert by_low[0.9].mean_confidence == pytest.approx((0.95 + 0.9 + 0.95) / 3)
    assert by_low[0.5].acceptance_rate == by_low[0.1].acceptance_rate == 0.0


def test_nothing_is_counted_of_nothing() -> None:
    report = DraftingMetrics().summary()
    assert report.acceptance_length == 1.0 and report.histogram == [] and report.tokens_per_denoiser_pass is None


def test_a_report_is_json() -> None:
    report = counted().summary()
    assert json.loads(json.dumps(report.to_json()))["histogram"] == report.histogram
