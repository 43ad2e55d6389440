"""When a run ends, and that it waits for its images: said once, and not of the start-up."""

import re

from loce.engine.pace import Pace, first_word, more_workers


def messages(pace: Pace, lines: int, every: int, waited: float, start: int = 0) -> list[tuple[int, str]]:
    """Lines every `every` iterations of 2 seconds each, of which the share `waited` is waiting."""
    found = []
    for line in range(lines):
        before, done = start + line * every, start + (line + 1) * every
        found += [(done, text) for text in pace.add(before, done, 2.0 * every, 2.0 * every * waited)]
    return found


def test_the_end_is_said_once_when_the_header_says_it() -> None:
    for start, every in ((0, 50), (0, 1), (7, 25), (1000, 20)):
        told = messages(Pace(start - start % every, 5000, ""), 120, every, 0.0, start - start % every)
        assert [done for done, _ in told][:1] == [first_word(start - start % every, 5000, every)] and len(told) <= 1


def test_the_text_of_the_end() -> None:
    ((done, text),) = messages(Pace(0, 1000, ""), 3, 50, 0.1)
    assert done == 100  # 900 iterations of 2 s are left
    assert re.fullmatch(r"expected end \d{4}-\d\d-\d\d \d\d:\d\d, 0:30 h from now, without evaluations", text)


def test_short_runs_do_not_say_it() -> None:
    assert first_word(0, 100, 50) == 0 and messages(Pace(0, 100, ""), 2, 50, 0.0) == []
    assert first_word(0, 101, 50) == 100


def test_waiting_is_told_once_and_not_of_the_start_up() -> None:
    pace = Pace(0, 10_000, "Set data.workers=8.")
    assert pace.add(0, 20, 40.0, 40.0) == []  # workers start: all of it is waiting
    told = messages(pace, 20, 25, 0.29, start=20)
    assert len(told) == 1 and "expected end" in told[0][1]
    told = messages(pace, 20, 25, 0.31, start=520)
    assert [text for _, text in told] == ["WARNING: 31% of the time is waiting for images. Set data.workers=8."]


def test_the_cure() -> None:
    assert more_workers(2, 16, 4).startswith("Set data.workers=4 (now 2; 16 cores for 4 processes")
    assert more_workers(0, 1, 2).startswith("Set data.workers=1")
    assert "data.workers=4 keeps all 16 cores busy" in more_workers(4, 16, 4)
