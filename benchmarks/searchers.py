"""Reinforcement learning beside its controls: same budget, same number of measurements, same fine-tuning.

    EDGEPRUNE_DATA=<folder> python benchmarks/searchers.py --out benchmarks/results/searchers.json

Every cell is one whole `edgeprune deploy` of ResNet-56 on CIFAR-10 on this CPU. Cells that are in the file already are
not run again, so that a stopped benchmark continues. The same searcher with the same seed in another file is another
measurement: latencies come from the device.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import raw_results

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

HERE = Path(__file__).parent
STRATEGIES = ("uniform", "random", "ddpg", "sac")


def main() -> None:
    """Run the cells that are missing, one at a time, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "searchers.json")
    parser.add_argument("--runs", type=Path, default=Path(tempfile.gettempdir()) / "edgeprune-searchers")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--budget", default="0.5x")
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    chosen = parser.parse_args()
    cells: list[dict[str, Any]] = json.loads(chosen.out.read_text()) if chosen.out.is_file() else []
    for seed in [] if chosen.table else chosen.seeds:
        for strategy in chosen.strategies:
            if not any((each["strategy"], each["seed"]) == (strategy, seed) for each in cells):
                cells.append({"about": raw_results.about(), **run_cell(strategy, seed, chosen)})
                raw_results.keep(chosen.out, cells)
    print(table(cells))


def run_cell(strategy: str, seed: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """Return the outcome of one deploy and every trial it made."""
    from edgeprune.deploy import deploy
    from edgeprune.intake.config import load_config
    from edgeprune.progress import Lines
    from edgeprune.stages.prepare import Request

    overrides = {
        "search.strategy": strategy,
        "search.seed": seed,
        "search.trials": chosen.trials,
        "budget.latency": chosen.budget,
    }
    config = load_config(HERE / "cifar10.toml", overrides)
    outcome = deploy(Request(config=config, target="host", out=chosen.runs, progress=Lines()))
    print(f"{strategy} {seed}: {100 * outcome.result.accuracy:.2f} %", file=sys.stderr)
    facts = outcome.to_json()
    for path in ("run_dir", "bundle", "archive", "report"):
        del facts[path]
    return {"strategy": strategy, "seed": seed, "outcome": facts, "trials": _trials(Path(outcome.run_dir))}


def _trials(folder: Path) -> list[dict[str, Any]]:
    from edgeprune.ledger import Ledger

    with Ledger.open(folder / "ledger.sqlite", read_only=True) as ledger:
        return [_row(trial) for trial in ledger.trials(ledger.runs()[0])]


def _row(trial: Any) -> dict[str, Any]:
    seen = trial.measurement
    return {
        "phase": trial.phase,
        "number": trial.number,
        "widths": list(trial.plan.widths.values()),
        "failure": trial.failure.kind if trial.failure else None,
        "reward": trial.score.reward,
        "feasible": trial.score.feasible,
        "terms": dict(trial.score.terms),
        "log_ratio_of_each_session": [round(each.log_ratio(), 5) for each in seen.sessions] if seen else [],
        "flags": list(seen.flags) if seen else [],
        "seconds": {name: round(value, 3) for name, value in trial.seconds.items()},
    }


def table(cells: list[dict[str, Any]]) -> str:
    """Return one line a searcher: means over seeds with the range."""
    head = (
        "| searcher | seeds | accuracy cut (validation) | accuracy tuned (validation) | accuracy tuned (test) "
        "| ratio | budget used | measurements | met |"
    )
    lines = [head, "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for strategy in dict.fromkeys(each["strategy"] for each in cells):
        mine = [each["outcome"] for each in cells if each["strategy"] == strategy]
        lines.append(
            f"| {strategy} | {len(mine)} "
            f"| {_percent([each['result']['validation']['cut'] for each in mine])} "
            f"| {_percent([each['result']['validation']['tuned'] for each in mine])} "
            f"| {_percent([each['result']['accuracy'] for each in mine])} "
            f"| {_span([each['result']['ratio']['p50'] for each in mine], 3)} "
            f"| {_percent([each['budget']['used'] for each in mine])} "
            f"| {_span([each['measurements'] for each in mine], 0)} "
            f"| {sum(each['budget']['met'] for each in mine)} of {len(mine)} |"
        )
    return "\n".join(lines)


def _percent(values: list[float]) -> str:
    return _span([100 * value for value in values], 2)


def _span(values: list[float], digits: int) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
