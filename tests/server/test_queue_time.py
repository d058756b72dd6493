"""The queue bounded by time: what a newcomer has to expect, and who is refused for it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mm_engine.server.queue_time import NUM_BEGUN, QueueTime
from serving import FLAGS, ServerProcess, wait_until

COMPLETIONS = "/v1/completions"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(clock: Clock) -> QueueTime:
    return QueueTime(clock)


def serve(queue: QueueTime, clock: Clock, num: int, seconds: float) -> None:
    """So many requests, one after the other, each with its first token after so long."""
    for _ in range(num):
        queue.join()
        clock.now += seconds
        queue.begin()


def test_nothing_is_expected_before_anything_is_known(queue: QueueTime, clock: Clock) -> None:
    assert queue.seconds == 0
    queue.join()
    clock.now += 5
    assert queue.seconds == 0 and queue.num_waiting == 1


def test_those_ahead_are_multiplied_by_the_pace(queue: QueueTime, clock: Clock) -> None:
    serve(queue, clock, 10, 0.5)
    assert queue.seconds == 0, "nobody is ahead"
    for _ in range(6):
        queue.join()
    assert queue.seconds == pytest.approx(6 * 0.5)


def test_hours_without_a_request_make_the_pace_no_slower(queue: QueueTime, clock: Clock) -> None:
    serve(queue, clock, 10, 0.5)
    clock.now += 7200
    serve(queue, clock, 10, 0.5)
    queue.join()
    assert queue.seconds == pytest.approx(0.5)


def test_a_pause_in_which_nobody_begins_counts_at_once(queue: QueueTime, clock: Clock) -> None:
    serve(queue, clock, 10, 0.5)
    queue.join()
    clock.now += 20
    assert queue.seconds == pytest.approx((10 * 0.5 + 20) / 10)


def test_those_that_begin_together_aside_the_pace_is_their_mean(
    queue: QueueTime, clock: Clock
) -> None:
    for _ in range(4):  # rounds in which 32 begin at once, after 8 seconds
        for _ in range(32):
            queue.join()
        clock.now += 8
        for _ in range(32):
            queue.begin()
    queue.join()
    assert queue.seconds == pytest.approx(8 / 32)


def test_the_pace_is_that_of_the_last(queue: QueueTime, clock: Clock) -> None:
    serve(queue, clock, 50, 60.0)
    serve(queue, clock, NUM_BEGUN, 0.1)
    queue.join()
    assert queue.seconds == pytest.approx(0.1)


def test_who_leaves_is_ahead_of_nobody(queue: QueueTime, clock: Clock) -> None:
    serve(queue, clock, 10, 0.5)
    queue.join()
    queue.join()
    queue.leave()
    assert queue.seconds == pytest.approx(0.5)
    queue.leave()
    assert queue.seconds == 0 and queue.num_waiting == 0


def ask(server: ServerProcess, **fields: object) -> int:
    body = {"prompt": "circle", "max_tokens": 1, **fields}
    answer = server.http.post(COMPLETIONS, json=body)
    if answer.status_code == 429:
        message = answer.json()["error"]["message"]
        assert message.startswith("the queue is too long: about ")
        assert 1 <= int(answer.headers["retry-after"]) < 60
    return answer.status_code


@pytest.mark.parametrize("limit", [None, "0.2"])
def test_requests_that_would_wait_too_long_are_refused(tmp_path: Path, limit: str | None) -> None:
    """One runs at a time, so the others wait for a long one. Without the limit all are taken."""
    flags = ("--max-num-seqs", "1", *(("--max-queue-seconds", limit) if limit else ()))
    with ServerProcess(tmp_path, *FLAGS, *flags) as server, ThreadPoolExecutor() as pool:
        assert [ask(server) for _ in range(4)] == [200] * 4
        long = {"prompt": "a", "ignore_eos": True, "max_tokens": 4000, "n": 16, "stream": True}
        with server.http.stream("POST", COMPLETIONS, json=long) as running:
            events = running.iter_lines()
            next(events)
            waiting = [pool.submit(ask, server) for _ in range(2)]
            in_flight = "mm_engine_num_requests_in_flight"
            wait_until(lambda: server.metric(in_flight) == 3, "the queue")
            time.sleep(1.0)  # in which none begins
            late = pool.submit(ask, server)
            if limit:
                assert late.result(5) == 429
            else:
                wait_until(lambda: server.metric(in_flight) == 4, "it to be taken, too")
            assert not any(one.done() for one in waiting)
        assert [one.result() for one in waiting] == [200, 200]
        assert late.result() == (429 if limit else 200)
        assert ask(server) == 200, "nobody is ahead any more"
        wait_until(lambda: server.is_idle, "it to be idle")
