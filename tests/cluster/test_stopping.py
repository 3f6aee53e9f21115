"""When a run saves between two steps."""

from __future__ import annotations

import pytest
import torch

from moescale.cluster import stopping
from moescale.cluster.stopping import Orders, StopRequests


def test_a_save_that_failed_is_tried_again_later_and_later(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    orders = Orders(StopRequests(), torch.device("cpu"), save_minutes=None, limit_minutes=None, started=0.0)

    def seconds_until_save() -> float:
        began = now[0]
        while not orders.ask(1).save:
            now[0] += 1
            if now[0] - began > 10_000:
                return float("inf")
        return now[0] - began

    assert seconds_until_save() == float("inf")
    for failures, wait in ((1, 30), (2, 60), (3, 120), (9, 600)):
        orders.saved()  # as each try begins
        orders.note_failures(failures)
        orders.note_failures(failures)
        assert seconds_until_save() == wait
    orders.saved()
    orders.note_failures(0)
    assert seconds_until_save() == float("inf")
