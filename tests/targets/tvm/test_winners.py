"""Which kernels a program gets once a search has ended."""

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("tvm", reason="TVM is not installed: pip install 'edgeprune[tvm]'")

from tuning_nets import GRAPH, conv, heavy, space_of
from tvm_on_host import host_cpu

from edgeprune.targets._tvm.lower import lower
from edgeprune.targets._tvm.program import Program
from edgeprune.targets._tvm.records import Record, Records, Trial, Verdict
from edgeprune.targets._tvm.space import traces
from edgeprune.targets._tvm.winners import chosen, network_record, tuned, tuned_name

RATIO = {0: (0.8, 0.7, 0.9)}


def won(program: Program, records: Records, place: int = 0) -> Program:
    """Return the program with a choice as the winner of one trial."""
    trial = Trial(choice=space_of(program)[place], ratio=0.8)
    records.write(heavy(program), Record(trials=(trial,), verdicts={1: Verdict(trial=0, ratio=RATIO)}))
    return tuned(program, host_cpu(), records, 1)


def test_a_winner_gets_a_name_of_its_own_and_stays_what_it_is_when_more_is_tried(tmp_path: Path) -> None:
    program, records = lower(conv(), host_cpu()), Records(folder=tmp_path)
    name, kernel = heavy(program), program.kernels[heavy(program)]
    first = won(program, records)
    [trace] = traces(name, kernel, host_cpu(), space_of(program)[:1])
    assert heavy(first) == tuned_name(name, trace) != name
    assert first.kernels[heavy(first)] == replace(kernel, trace=trace)
    assert [each.buffers for each in first.steps] == [each.buffers for each in program.steps]
    record = records.read(name, space_of(program))
    more = Trial(choice=space_of(program)[1], ratio=0.7)
    later = {1: (0.7, 0.6, 0.8)}
    records.write(
        name,
        replace(record, trials=(*record.trials, more), verdicts={**record.verdicts, 2: Verdict(trial=1, ratio=later)}),
    )
    assert tuned(program, host_cpu(), records, 1) == first
    assert tuned(program, host_cpu(), records, 2) != first
    assert tuned(program, host_cpu(), records, 3) == program


def test_winners_are_used_only_as_a_whole_that_was_seen_to_be_faster(tmp_path: Path) -> None:
    program, records = lower(conv(), host_cpu()), Records(folder=tmp_path)
    best = won(program, records)
    assert chosen(program, host_cpu(), records, 1, GRAPH) == program
    records.write(network_record(GRAPH, best), Record(verdicts={1: Verdict(trial=None, ratio=RATIO)}))
    assert chosen(program, host_cpu(), records, 1, GRAPH) == program
    records.write(network_record(GRAPH, best), Record(verdicts={1: Verdict(trial=0, ratio=RATIO)}))
    assert chosen(program, host_cpu(), records, 1, GRAPH) == best
    assert chosen(program, host_cpu(), records, 1, "34" * 32) == program
    assert won(program, records, place=3) != best
    assert chosen(program, host_cpu(), records, 1, GRAPH) == program, "these were not compared as a whole"
