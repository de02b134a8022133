"""The drafter's numbers on their way from a worker to /metrics and to the log."""

import multiprocessing
import tempfile
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from vllm_twotower import metrics
from vllm_twotower.metrics import PLANNED, DrafterStats, PlannedDrafts, log_line
from vllm_twotower.stats_folder import STATS_FOLDER_VARIABLE, stats_path


def _work(path: Path) -> None:
    stats = DrafterStats(path)
    stats.add("rounds", 3)
    stats.add("drafting_seconds", 0.25, "denoise")
    stats.add("fallbacks", 2, "no room")
    stats.set("acceptance_length", 4.5)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Folder for temporary files, in which nobody publishes yet."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(metrics._Collector, "instance", None)
    monkeypatch.setenv(STATS_FOLDER_VARIABLE, "")
    return tmp_path


def page_of(registry: CollectorRegistry) -> str:
    return generate_latest(registry).decode()


def test_another_process_sees_what_a_worker_counts(folder: Path) -> None:
    metrics.publish(starts_engines=True)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))  # as vLLM does with several API servers
    assert "twotower" not in page_of(registry)  # no engine has started
    path = stats_path(1)
    assert path is not None
    worker = multiprocessing.get_context("spawn").Process(target=_work, args=(path,))
    worker.start()
    worker.join()
    page = page_of(registry)
    assert 'vllm:twotower_rounds_total{engine="1"} 3.0' in page
    assert 'vllm:twotower_drafting_seconds_total{engine="1",phase="denoise"} 0.25' in page
    assert 'vllm:twotower_fallbacks_total{engine="1",reason="no room"} 2.0' in page
    assert 'vllm:twotower_acceptance_length{engine="1"} 4.5' in page
    assert page_of(REGISTRY).count('vllm:twotower_rounds_total{engine="1"} 3.0') == 1


def test_an_api_server_shows_the_engines_that_the_process_above_it_has_started(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics.publish(starts_engines=True)
    (only,) = folder.iterdir()
    monkeypatch.setattr(metrics._Collector, "instance", None)  # as in a process of its own
    metrics.publish(starts_engines=False)
    assert list(folder.iterdir()) == [only]
    for engine in (0, 1):
        path = stats_path(engine)
        assert path is not None and path.parent == only
        _work(path)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))
    page = page_of(registry)
    assert all(f'vllm:twotower_rounds_total{{engine="{engine}"}} 3.0' in page for engine in (0, 1))


def test_a_second_engine_starts_from_nothing(tmp_path: Path) -> None:
    _work(tmp_path / "stats.0")
    assert DrafterStats(tmp_path / "stats.0").get("rounds") == 0


def test_without_a_reader_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STATS_FOLDER_VARIABLE, raising=False)
    assert stats_path(0) is None
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


def test_a_scheduler_sees_what_a_drafter_in_another_process_plans(tmp_path: Path) -> None:
    path = tmp_path / "0.stats"
    free, bounded = (PlannedDrafts(path, 7, table) for table in (None, [0, 7, 2]))
    assert (free[1], bounded[1], bounded[2]) == (7, 7, 2), "no drafter yet"
    stats = DrafterStats(path)
    for planned in (0, 5):
        stats.set(PLANNED, planned)
        assert (free[2], bounded[1], bounded[2]) == (planned, planned, min(planned, 2))
    assert PlannedDrafts(None, 7, None)[3] == 7
