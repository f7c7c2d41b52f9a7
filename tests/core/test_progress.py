"""Progress: what is counted, how fast, and the time left."""

from __future__ import annotations

import logging

import pytest

from latent_medi.core import progress
from latent_medi.core.progress import Progress


class Clock:
    """A clock that tests set."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("latent_medi"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


def test_patches_are_counted_with_the_time_left(clock: Clock, log: pytest.LogCaptureFixture) -> None:
    for _ in progress.progress(range(5), 1100, "encoding", "patches", 256):
        clock.now += 4
    assert log.messages == [
        "encoding: 512 of 1,100 patches, 64 patches/s, 9s left",
        "encoding: 1,100 of 1,100 patches, 55 patches/s, 0s left",
    ]


def test_what_an_earlier_command_did_says_nothing_of_the_speed(
    clock: Clock, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Progress(1000, "training", "images") as shown:
        shown.skip(900)
        clock.now = 10
        shown.add(10)
    assert log.messages == ["training: 910 of 1,000 images, 1 images/s, 1m30s left"]
    log.clear()
    monkeypatch.setenv("RANK", "1")  # the second of several processes
    with Progress(None, "reading", "images") as shown:
        clock.now = 100
        shown.add(1)
    assert not log.messages


def test_items_of_different_sizes(clock: Clock, log: pytest.LogCaptureFixture) -> None:
    for _ in progress.progress(["a", "b"], desc="joining", unit="patches", each=[30, 70]):
        clock.now += 6
    assert log.messages == ["joining: 30 of 100 patches, 5 patches/s, 14s left"]
    for _ in progress.progress(iter("ab"), desc="listing", unit="tars"):
        clock.now += 10
    assert log.messages[1:] == ["listing: 1 tars, 0.1 tars/s", "listing: 2 tars, 0.1 tars/s"]
