import random
import threading

import pytest

from edgeprune.targets._onnxruntime_worker import alternate, lacking, to_each_thread, warm_up


class Bench:
    """A clock that only its engines move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def engine(self, seconds):
        """Return an engine whose n-th call takes `seconds(n)`."""
        calls = iter(range(10**9))

        def call() -> None:
            self.now += seconds(next(calls))

        return call


def nothing() -> None:
    pass


def test_a_steady_engine_is_warm_after_three_calls_and_fifteen_milliseconds() -> None:
    bench = Bench()
    call_s, calls, agreed = warm_up(bench.engine(lambda _: 0.004), nothing, bench)
    assert (call_s, calls, agreed) == (pytest.approx(0.004), 4, True)


def test_an_engine_that_is_slow_at_first_is_called_until_it_is_not() -> None:
    bench = Bench()
    call_s, calls, agreed = warm_up(bench.engine(lambda n: 0.002 * (2.0 - n / 10 if n < 10 else 1.0)), nothing, bench)
    assert call_s == pytest.approx(0.002)
    assert agreed
    assert calls >= 10


def test_an_engine_that_never_settles_is_given_up_and_called_so() -> None:
    bench = Bench()
    _, calls, agreed = warm_up(bench.engine(lambda n: 0.002 * 1.2**n), nothing, bench)
    assert not agreed
    assert bench.now < 1.0
    assert calls < 40


def test_a_slow_engine_is_warmed_with_few_calls() -> None:
    bench = Bench()
    _, calls, agreed = warm_up(bench.engine(lambda _: 0.3), nothing, bench)
    assert (calls, agreed) == (3, True)


def session(bench: Bench, engines, blocks, session_s: float, seed: int = 0):
    """Return what `alternate` kept, a row being (time of the call, 0, 0)."""

    def sample(call, count):
        rows = []
        for _ in range(count):
            before = bench.now
            call()
            rows.append((round((bench.now - before) * 1e9), 0, 0))
        return rows

    return alternate(engines, blocks, session_s, random.Random(seed), sample, between=nothing, clock=bench)


def test_calls_after_a_switch_are_dropped() -> None:
    """The first two calls of each block take ten times as long, and none of them is kept."""
    bench = Bench()
    engines = [bench.engine(lambda n: 0.01 if n % 6 < 2 else 0.001) for _ in range(2)]
    for rows in session(bench, engines, [(2, 4), (2, 4)], 1.0):
        assert len(rows) > 20
        assert {wall for wall, *_ in rows} == {1_000_000}


def test_a_session_lasts_as_long_as_asked_and_samples_both_equally() -> None:
    bench = Bench()
    candidate, reference = session(bench, [bench.engine(lambda _: 0.001)] * 2, [(2, 4), (2, 4)], 0.2)
    assert len(candidate) == len(reference)
    assert 0.2 <= bench.now < 0.2 + 2 * 6 * 0.001


def test_engines_slower_than_the_session_still_alternate_twice() -> None:
    bench = Bench()
    candidate, reference = session(bench, [bench.engine(lambda _: 5.0)] * 2, [(1, 4), (1, 4)], 0.2)
    assert len(candidate) == len(reference) == 8


def test_the_order_of_blocks_is_drawn_and_the_same_for_the_same_seed() -> None:
    def order(seed: int) -> list[int]:
        bench, called = Bench(), []

        def named(which: int):
            def call() -> None:
                called.append(which)
                bench.now += 0.001

            return call

        session(bench, [named(0), named(1)], [(0, 1), (0, 1)], 0.1, seed)
        return called

    assert order(1) == order(1)
    assert order(1) != order(2)
    pairs = list(zip(order(1)[::2], order(1)[1::2], strict=True))
    assert set(pairs) == {(0, 1), (1, 0)}


def test_a_thread_that_ends_while_threads_are_listed_is_passed_over() -> None:
    """ONNX Runtime's own threads come and go; one vanished once in about a hundred measurements."""
    stay, seen = threading.Event(), []
    others = [threading.Thread(target=stay.wait) for _ in range(3)]
    for each in others:
        each.start()

    def change(thread: int) -> None:
        seen.append(thread)
        if thread != threading.get_native_id():
            raise ProcessLookupError

    to_each_thread(change)
    stay.set()
    for each in others:
        each.join()
    assert {threading.get_native_id(), *(each.native_id for each in others)} <= set(seen)


def test_a_refused_priority_is_not_passed_over() -> None:
    def refuse(_: int) -> None:
        raise PermissionError

    with pytest.raises(PermissionError):
        to_each_thread(refuse)


def test_a_machine_that_slows_down_steadily_leaves_the_ratio_alone() -> None:
    """Both engines become 50 % slower over the session; the ratio of their means is still 2."""
    bench = Bench()
    engines = [bench.engine(lambda _, cost=cost: cost * (1 + bench.now)) for cost in (0.002, 0.001)]
    candidate, reference = session(bench, engines, [(2, 4), (2, 8)], 0.5)
    means = [sum(wall for wall, *_ in rows) / len(rows) for rows in (candidate, reference)]
    assert means[0] / means[1] == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize(
    ("error", "machine"),
    [
        (MemoryError(), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("BFCArena::AllocateRawInternal(size_t) Failed to allocate memory for requested buffer"), True),
        (RuntimeError("pthread_create failed, error code: 11"), True),
        (RuntimeError("Node (conv1) Op (Conv) [ShapeInferenceError] wrong rank"), False),
        (ValueError("Required inputs are missing"), False),
    ],
)
def test_a_machine_that_runs_short_is_not_blamed_on_the_model(error: Exception, machine: bool) -> None:
    assert lacking(error) == machine
