"""A search for faster schedules: what it wants measured, and that only what is faster is taken."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tvm", reason="TVM is not installed: pip install 'edgeprune[tvm]'")

from tuning_nets import GRAPH, heavy, product, search_for, space_of
from tvm_on_host import host_cpu

from edgeprune.targets._tvm.engine import read_engine
from edgeprune.targets._tvm.lower import lower
from edgeprune.targets._tvm.records import Record
from edgeprune.targets._tvm.space import traces
from edgeprune.targets._tvm.tuning import OURS, Search, Task
from edgeprune.targets._tvm.winners import chosen
from edgeprune.targets._tvm_rpc_search import Tuning


def known(search: Search) -> Record:
    return search.records.read(heavy(search.program), space_of(search.program))


def batch_of(search: Search) -> Task:
    task = search.next_task()
    assert task is not None
    assert not task.finalists
    return task


def test_a_batch_runs_ours_and_every_trial_on_the_same_inputs(tmp_path: Path) -> None:
    search = search_for(lower(product(), host_cpu()), tmp_path)
    task = batch_of(search)
    script = read_engine(task.engines[0]).script
    assert [call.layer for call in script.calls] == [OURS, "0", "1", "2", "3"]
    assert len({call.slots[:-1] for call in script.calls}) == 1
    assert len({call.slots[-1] for call in script.calls}) == 5
    assert len({call.kernel for call in script.calls}) == 5


def test_only_the_fastest_that_were_right_are_compared_once_more(tmp_path: Path) -> None:
    search = search_for(lower(product(), host_cpu()), tmp_path)
    search.tried(batch_of(search), {OURS: 10.0, "0": 5.0, "1": 8.0, "2": 9.0, "3": 11.0}, {"0": "off by 3"})
    record = known(search)
    assert [each.ratio for each in record.trials] == [None, 0.8, 0.9, 1.1]
    assert record.trials[0].failed == "off by 3"
    task = search.next_task()
    assert task is not None
    assert task.finalists == (1, 2)
    assert len(task.engines) == 3


@pytest.mark.parametrize(
    ("ratios", "winner"),
    [
        ([(0.9, 0.85, 0.95), (0.8, 0.7, 0.9)], 1),
        ([(0.9, 0.85, 0.95), (0.8, 0.5, 1.1)], 0),
        ([(0.99, 0.97, 1.01), (1.0, 0.9, 1.1)], None),
    ],
)
def test_a_kernel_is_taken_only_if_the_whole_interval_is_faster(
    tmp_path: Path, ratios: list[tuple[float, float, float]], winner: int | None
) -> None:
    search = search_for(lower(product(), host_cpu()), tmp_path, trials=2)
    search.tried(batch_of(search), {OURS: 10.0, "0": 8.0, "1": 9.0}, {})
    task = search.next_task()
    assert task is not None
    search.judged(task, ratios)
    assert known(search).verdicts[2].trial == winner
    last = search.next_task()
    assert (last is None) == (winner is None)
    assert last is None or last.whole


@pytest.mark.parametrize(("ratio", "taken"), [((0.95, 0.93, 0.97), True), ((0.99, 0.97, 1.01), False)])
def test_winners_are_used_only_where_the_whole_network_is_faster_with_them(
    tmp_path: Path, ratio: tuple[float, float, float], taken: bool
) -> None:
    search = search_for(lower(product(), host_cpu()), tmp_path, trials=2)
    search.tried(batch_of(search), {OURS: 10.0, "0": 8.0, "1": 9.0}, {})
    final = search.next_task()
    assert final is not None
    search.judged(final, [(0.8, 0.7, 0.9), (0.9, 0.8, 1.0)])
    whole = search.next_task()
    assert whole is not None
    assert whole.whole
    assert [len(read_engine(each).script.calls) for each in whole.engines] == [len(search.program.steps)] * 2
    assert chosen(search.program, host_cpu(), search.records, 2, GRAPH) == search.program
    search.judged(whole, [ratio])
    assert search.next_task() is None
    assert (chosen(search.program, host_cpu(), search.records, 2, GRAPH) != search.program) is taken


def test_a_trial_that_cannot_be_compiled_is_noted_and_the_others_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = search_for(lower(product(), host_cpu()), tmp_path, trials=2)

    first = [['[[["Nothing", [], [], []]], []]']]

    def nonsense(*arguments: Any) -> list[str]:
        return first.pop() if first else traces(*arguments)

    monkeypatch.setattr("edgeprune.targets._tvm.tuning.traces", nonsense)
    task = batch_of(search)
    assert [bool(each.failed) for each in task.trials] == [True, False]
    search.tried(task, {OURS: 10.0, "0": 9.0}, {})
    assert [each.ratio for each in known(search).trials] == [None, 0.9]


def test_a_damaged_record_is_searched_again_and_that_is_said(tmp_path: Path) -> None:
    search = search_for(lower(product(), host_cpu()), tmp_path, trials=2)
    search.tried(batch_of(search), {OURS: 10.0, "0": 8.0, "1": 9.0}, {})
    [path] = search.records.folder.iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    task = batch_of(search)
    assert (task.again, task.share) == (True, 0.0)
    assert "damaged" in Tuning(search).next(None)["note"]
    search.tried(task, {OURS: 10.0, "0": 8.0, "1": 9.0}, {})
    final = search.next_task()
    assert final is not None
    assert (final.again, len(known(search).trials)) == (False, 2)
