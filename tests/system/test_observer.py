"""What rooms tell: callbacks that become jobs, and a silence that takes everything."""

from __future__ import annotations

from gemma_ft.system.observer import SILENT, Observer, callbacks
from tests.observed import Observed


def test_a_callback_is_a_job_from_its_first_step_on() -> None:
    observer = Observed()
    with callbacks(observer) as on_progress:
        first, second = on_progress("merge"), on_progress("compare")
        assert observer.jobs == []
        for done in (1, 2, 5):
            first(done, 7)
        second(3, 3)
    assert observer.jobs == [("merge", 7, 0), ("compare", 3, 0)]
    assert observer.counts == [1, 1, 3, 3]


def test_silence_takes_everything() -> None:
    silent: Observer = SILENT
    silent.say("a line")
    silent.warn("a line")
    with silent.heard(lambda: None), silent.job("work", 3, done=1) as job, silent.job("more"):
        job.advance()
        job.advance(2, loss=None, tokens=4)
        job.phase("now")
