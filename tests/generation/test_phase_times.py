"""Seconds by phase on CUDA devices: streams and events are stand-ins with clocks of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from twotower_spec.generation import PhaseTimes, phase_times

FIRST, SECOND, HOST = torch.device("cuda:0"), torch.device("cuda:1"), torch.device("cpu")


class Stream:
    def __init__(self) -> None:
        self.now = 0.0

    def wait_event(self, event: Event) -> None:
        self.now = max(self.now, event.at)

    def run(self, seconds: float, needs: Stream | None = None) -> None:
        """Work that may need what another stream has been given to do before."""
        self.now = max(self.now, needs.now if needs else 0.0) + seconds


class Event:
    host = Stream()

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self, stream: Stream) -> None:
        self.at = stream.now = max(stream.now, self.host.now)  # an idle device is as late as the host

    def query(self) -> bool:
        return self.at <= self.host.now

    def synchronize(self) -> None:
        self.host.wait_event(self)

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.at - self.at)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[torch.device, Stream]]:
    found = {device: Stream() for device in (FIRST, SECOND, HOST)}
    monkeypatch.setattr(Event, "host", found[HOST])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", found.__getitem__)
    monkeypatch.setattr(phase_times.time, "perf_counter", lambda: found[HOST].now)
    return found


@pytest.mark.parametrize("devices", [(FIRST, FIRST), (FIRST, SECOND), (FIRST, HOST), (HOST, FIRST), (HOST, HOST)])
def test_phases_on_any_two_devices_count_no_second_twice(
    devices: tuple[torch.device, torch.device], streams: dict[torch.device, Stream]
) -> None:
    context, denoiser = devices
    times = PhaseTimes()
    with times.measure("extend", context):
        streams[context].run(3.0)
    with times.measure("denoise", denoiser):
        streams[denoiser].run(2.0, needs=streams[context])
    assert (times.extend_s, times.denoise_s, times.total_s) == (3.0, 2.0, 5.0)


def test_times_are_known_when_the_device_is_done_and_reading_waits_for_it(streams: dict[torch.device, Stream]) -> None:
    times = PhaseTimes()
    with times.measure("denoise", HOST):
        streams[HOST].run(1.0)
    assert times.known
    with times.measure("extend", FIRST):
        streams[FIRST].run(4.0)
    assert not times.known and streams[HOST].now == 1.0
    assert times.extend_s == 4.0 and times.known and streams[HOST].now == 5.0
