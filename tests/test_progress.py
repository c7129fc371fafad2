"""Progress bars, and log lines without a terminal."""

import io
import logging
import sys

from rich.console import Console

from pspnet_jax import progress


def test_a_line_every_half_minute_shows_progress_rate_and_time_left(monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO)
    with progress.progress("evaluating val", 200) as advance:
        for seconds, images in ((10, 5), (20, 10), (29, 10), (1, 5)):
            now[0] += seconds
            advance(images)
    assert [record.message for record in caplog.records] == [
        "evaluating val: 15/200 images, 0.5 images/s, 0:06:10 left",
        "evaluating val: 30/200 images, 0.5 images/s, 0:05:40 left",
    ]


def test_a_title_with_brackets_is_shown_unchanged(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=terminal, force_terminal=True, width=100))
    with progress.progress("evaluating val[a] [/b]", 2) as advance:
        advance(1)
    assert "evaluating val[a] [/b]" in terminal.getvalue()


def test_a_closed_stderr_is_not_a_terminal(monkeypatch, caplog):
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0)
    caplog.set_level(logging.INFO)
    with progress.progress("evaluating", 2) as advance:
        advance(2)
    assert caplog.messages[0].startswith("evaluating: 2/2 images, ")
