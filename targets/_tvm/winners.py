"""A program with the kernels that a search found to be faster, as the records tell."""

import hashlib
from dataclasses import replace

from edgeprune.canonical import digest

from .cpus import Cpu
from .program import Kernel, Program
from .records import Records
from .space import choices, traces


def chosen(program: Program, cpu: Cpu, records: Records, trials: int, graph: str) -> Program:
    """Return the program with its winners if the network was seen to be faster with just these, else as it is.

    Args:
        graph: SHA-256 of the network's ONNX file.
    """
    best = tuned(program, cpu, records, trials)
    verdict = records.read(network_record(graph, best)).verdicts.get(trials)
    return best if verdict and verdict.trial is not None else program


def network_record(graph: str, best: Program) -> str:
    """Return the name of the record that tells whether a network is faster with the kernels of `best`."""
    return f"graph-{digest([graph, sorted(best.kernels)])[:24]}"


def tuned(program: Program, cpu: Cpu, records: Records, trials: int) -> Program:
    """Return the program with the winner among the first `trials` trials in place of each kernel that has one."""
    kernels, names = {}, {}
    for name, kernel in program.kernels.items():
        best = _winner(name, kernel, cpu, records, trials) if name in records else kernel
        names[name] = tuned_name(name, best.trace)
        kernels[names[name]] = best
    return replace(
        program, kernels=kernels, steps=tuple(replace(each, kernel=names[each.kernel]) for each in program.steps)
    )


def _winner(name: str, kernel: Kernel, cpu: Cpu, records: Records, trials: int) -> Kernel:
    record = records.read(name, [choice for choice, _ in choices(kernel, cpu)])
    verdict = record.verdicts.get(trials)
    if verdict is None or verdict.trial is None or not record.trials:
        return kernel
    [trace] = traces(name, kernel, cpu, [record.trials[verdict.trial].choice])
    return replace(kernel, trace=trace)


def tuned_name(name: str, trace: str) -> str:
    """Return the name of a kernel with another schedule: its object code is cached beside that of ours."""
    return "k" + hashlib.sha256(f"{name} {trace}".encode()).hexdigest()[:24] if trace else name
