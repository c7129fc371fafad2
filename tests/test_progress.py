"""Without a terminal, a line every half minute."""

import logging

from pspnet_jax import progress


def test_lines_say_how_far_how_fast_and_how_long(monkeypatch, caplog):
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
