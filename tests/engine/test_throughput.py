"""When a run ends, and that it waits for its images: said once, and not of the start-up."""

import re

from loce.engine.log import Throughput, more_workers, speed_known_at


def messages(throughput: Throughput, lines: int, every: int, waited: float, start: int = 0) -> list[tuple[int, str]]:
    """Lines every `every` iterations of 2 seconds each, of which the share `waited` is waiting."""
    found = []
    for line in range(lines):
        before, done = start + line * every, start + (line + 1) * every
        found += [(done, text) for text in throughput.add(before, done, 2.0 * every, 2.0 * every * waited)]
    return found


def test_the_end_is_said_once_when_the_summary_says_it() -> None:
    for start, every in ((0, 50), (0, 1), (7, 25), (1000, 20)):
        said = messages(Throughput(start - start % every, 5000, ""), 120, every, 0.0, start - start % every)
        assert [done for done, _ in said][:1] == [speed_known_at(start - start % every, 5000, every)] and len(said) <= 1


def test_the_text_of_the_end() -> None:
    ((done, text),) = messages(Throughput(0, 1000, ""), 3, 50, 0.1)
    assert done == 100  # 900 iterations of 2 s are left
    assert re.fullmatch(r"expected end \d{4}-\d\d-\d\d \d\d:\d\d, 0:30 h from now, without evaluations", text)


def test_short_runs_do_not_say_it() -> None:
    assert speed_known_at(0, 100, 50) == 0 and messages(Throughput(0, 100, ""), 2, 50, 0.0) == []
    assert speed_known_at(0, 101, 50) == 100


def test_waiting_is_said_once_and_not_of_the_start_up() -> None:
    throughput = Throughput(0, 10_000, "Set data.workers=8.")
    assert throughput.add(0, 20, 40.0, 40.0) == []  # workers start: all of it is waiting
    said = messages(throughput, 20, 25, 0.29, start=20)
    assert len(said) == 1 and "expected end" in said[0][1]
    said = messages(throughput, 20, 25, 0.31, start=520)
    assert [text for _, text in said] == ["WARNING: 31% of the time is waiting for images. Set data.workers=8."]


def test_the_remedy() -> None:
    assert more_workers(2, 16, 4).startswith("Set data.workers=4 (now 2; 16 cores for 4 processes")
    assert more_workers(0, 1, 2).startswith("Set data.workers=1")
    assert "data.workers=4 keeps all 16 cores busy" in more_workers(4, 16, 4)
