"""The drafter's numbers on their way from a worker to /metrics and to the log."""

import multiprocessing
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from vllm_twotower import metrics
from vllm_twotower.metrics import DrafterStats, log_line


def _work(path: Path) -> None:
    stats = DrafterStats(path)
    stats.add("rounds", 3)
    stats.add("drafting_seconds", 0.25, "denoise")
    stats.add("fallbacks", 2, "no room")
    stats.set("acceptance_length", 4.5)


def test_another_process_sees_what_a_worker_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base = tmp_path / "stats"
    monkeypatch.setenv(metrics.STATS_FILE_VARIABLE, str(base))
    collector = metrics._Collector()
    collector.bases.append(base)
    registry = CollectorRegistry()
    registry.register(collector)
    assert b"twotower" not in generate_latest(registry)  # no engine has started
    path = metrics.stats_path(1)
    assert path is not None
    worker = multiprocessing.get_context("spawn").Process(target=_work, args=(path,))
    worker.start()
    worker.join()
    page = generate_latest(registry).decode()
    assert 'vllm:twotower_rounds_total{engine="1"} 3.0' in page
    assert 'vllm:twotower_drafting_seconds_total{engine="1",phase="denoise"} 0.25' in page
    assert 'vllm:twotower_fallbacks_total{engine="1",reason="no room"} 2.0' in page
    assert 'vllm:twotower_acceptance_length{engine="1"} 4.5' in page
    collector.remove_files()
    assert not list(tmp_path.iterdir())


def test_a_second_engine_starts_from_nothing(tmp_path: Path) -> None:
    _work(tmp_path / "stats.0")
    assert DrafterStats(tmp_path / "stats.0").get("rounds") == 0


def test_without_a_reader_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(metrics.STATS_FILE_VARIABLE, raising=False)
    assert metrics.stats_path(0) is None
    stats = DrafterStats(None)
    stats.add("rounds", 1)
    assert stats.get("rounds") == 1


def test_the_log_line_tells_of_the_time_since_the_last_one() -> None:
    stats = DrafterStats(None)
    assert log_line(stats, stats.copy()) is None
    for name, amount in (("rounds", 100), ("drafts", 150), ("draft_tokens", 900), ("accepted_tokens", 450)):
        stats.add(name, amount)
    before = stats.copy()
    for name, amount in (("rounds", 10), ("drafts", 20), ("draft_tokens", 140), ("accepted_tokens", 70)):
        stats.add(name, amount)
    stats.add("drafting_seconds", 0.04, "denoise")
    stats.add("fallbacks", 3, "policy")
    line = log_line(stats, before)
    assert line is not None
    assert "Mean acceptance length: 4.50, Drafts: 20 in 10 rounds, Drafted: 140 tokens, Accepted: 70 tokens" in line
    assert "Drafting: 4.0 ms/round (extend 0.0, denoise 4.0, host 0.0)" in line and "policy 3" in line
