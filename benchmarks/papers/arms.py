"""Methods beside their controls: for every arm the same network, budget, measurements and fine-tuning.

    EDGEPRUNE_DATA=<folder> python benchmarks/papers/arms.py entropy-rl --network resnet56 --budgets 0.5x 0.2x
    EDGEPRUNE_DATA=<folder> python benchmarks/papers/arms.py autodfp --network resnet56 --budgets 0.7x --target macs

Every cell is one whole `edgeprune deploy` and takes minutes. It is written to the results as soon as it ends; cells
that are there are not run again, so that a stopped benchmark continues. `--table` prints what is there.

Target "host" is this CPU, measured. Target "macs" is a formula: its ratios are those of multiply-accumulates, and
nothing is timed.

On the CIFAR networks the arms of autodfp run with --data-free: candidates are judged, and their batch norms
carried over, on synthetic images. Of the network with 1,000 classes these would have to be too many; there
candidates are judged by the unpruned model's answers to unlabelled images, and batch norms keep their statistics.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import raw_results

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).parents[2]

Settings = dict[str, Any]

PLAIN: Settings = {"search.reward.entropy": 0.0}
FREE: Settings = {"search.method": "autodfp"}
SEEDLESS = "uniform"
"""Arms that begin like this are run with the first seed alone: the seed only makes the synthetic images."""

OWN: dict[tuple[str, str], Settings] = {
    ("autodfp", "resnet56"): {"search.data_free": True},
    ("autodfp", "vgg16_thin"): {"search.data_free": True},
    ("autodfp", "mobilenetv2"): {"search.recalibrate": False},
}
"""Comparison and network → settings of all its arms."""

ARMS: dict[str, dict[str, Settings]] = {
    "entropy-rl": {
        "accuracy": {"search.method": "amc", **PLAIN},
        "entropy": {"search.method": "entropy-rl"},
        "mixed": {"search.method": "entropy-rl", "search.reward.accuracy": 1.0},
        "random": {"search.method": "amc", "search.strategy": "random", **PLAIN},
    },
    "autodfp": {
        "autodfp": FREE,
        "random, same repairs": {**FREE, "search.strategy": "random"},
        "uniform, plain": {
            **FREE,
            "search.strategy": "uniform",
            "search.reconstruction": "none",
            "search.repairs": False,
        },
        "uniform, merge": {
            **FREE,
            "search.strategy": "uniform",
            "search.reconstruction": "merge",
            "search.repairs": False,
        },
        "uniform, ridge": {
            **FREE,
            "search.strategy": "uniform",
            "search.reconstruction": "ridge",
            "search.repairs": False,
        },
        "uniform, local-ridge": {**FREE, "search.strategy": "uniform", "search.repairs": False},
    },
}
"""Comparison → arm → settings on top of those of the network's own configuration beside this file."""


def main() -> None:
    """Run the cells that are missing, one at a time, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comparison", choices=list(ARMS))
    parser.add_argument("--network", default="resnet56", choices=("resnet56", "vgg16_thin", "mobilenetv2"))
    parser.add_argument("--target", default="host", choices=("host", "macs"))
    parser.add_argument("--budgets", nargs="+", default=["0.5x"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--steps", type=int, default=120, help="of fine-tuning, where a method fine-tunes")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", type=Path, default=Path(tempfile.gettempdir()) / "edgeprune-arms")
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    chosen = parser.parse_args()
    out = chosen.out or ROOT / f"benchmarks/results/papers/{chosen.comparison}.json"
    cells: list[dict[str, Any]] = json.loads(out.read_text()) if out.is_file() else []
    for key in [] if chosen.table else wanted(chosen):
        if not any(all(each[name] == value for name, value in key.items()) for each in cells):
            settings = OWN.get((chosen.comparison, chosen.network), {}) | ARMS[chosen.comparison][key["arm"]]
            cells.append({**key, "about": raw_results.about(), **run_cell(key, settings, chosen.runs)})
            raw_results.keep(out, cells)
    print(table(cells))


def wanted(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what names each cell; all arms of a seed come before the next seed."""
    arms = chosen.arms or list(ARMS[chosen.comparison])
    shared = {"network": chosen.network, "target": chosen.target, "trials": chosen.trials, "steps": chosen.steps}
    return [
        {**shared, "budget": budget, "seed": seed, "arm": arm}
        for budget in chosen.budgets
        for seed in chosen.seeds
        for arm in arms
        if seed == chosen.seeds[0] or not arm.startswith(SEEDLESS)
    ]


def run_cell(key: dict[str, Any], settings: Settings, runs: Path) -> dict[str, Any]:
    """Return the outcome of one deploy and what its candidates were seen to be."""
    from edgeprune.deploy import deploy
    from edgeprune.intake.config import load_config
    from edgeprune.ledger import Ledger
    from edgeprune.progress import Lines
    from edgeprune.stages.prepare import Request

    common = {
        "budget.latency": key["budget"],
        "search.trials": key["trials"],
        "search.seed": key["seed"],
        "finetune.seed": key["seed"],
    }
    if settings.get("search.method") != "autodfp":
        common["finetune.steps"] = key["steps"]
    config = load_config(Path(__file__).with_name(f"{key['network']}.toml"), {**common, **settings})
    outcome = deploy(Request(config=config, target=key["target"], out=runs, progress=Lines()))
    print(f"{key}: {100 * outcome.result.accuracy:.2f} %", file=sys.stderr)
    facts = outcome.to_json()
    for path in ("run_dir", "bundle", "archive", "report"):
        del facts[path]
    with Ledger.open(Path(outcome.run_dir) / "ledger.sqlite", read_only=True) as ledger:
        trials = [{"phase": each.phase, "terms": dict(each.score.terms)} for each in ledger.trials(ledger.runs()[0])]
    return {"outcome": facts, "candidates": trials}


def table(cells: list[dict[str, Any]]) -> str:
    """Return one line for each network, target, budget and arm: means over seeds with the range."""
    lines = [
        "| network | of | budget | arm | seeds | as cut % | **test %** | ratio | MACs % | entropy and accuracy | met |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(named(each) for each in cells):
        mine = [each["outcome"] for each in cells if named(each) == name]
        correlations = [
            each["entropy_rank_correlation"] for each in mine if each["entropy_rank_correlation"] is not None
        ]
        lines.append(
            f"| {' | '.join(name)} | {len(mine)} "
            f"| {span([100 * each['result']['validation']['cut'] for each in mine], 2)} "
            f"| {span([100 * each['result']['accuracy'] for each in mine], 2)} "
            f"| {span([each['result']['ratio']['p50'] for each in mine], 3)} "
            f"| {span([100 * each['result']['macs'] / each['baseline']['macs'] for each in mine], 1)} "
            f"| {span(correlations, 2) if correlations else ''} "
            f"| {sum(each['budget']['met'] for each in mine)} of {len(mine)} |"
        )
    return "\n".join(lines)


def named(cell: dict[str, Any]) -> tuple[str, ...]:
    """Return what the seeds of a cell have in common."""
    return cell["network"], {"host": "latency", "macs": "MACs"}[cell["target"]], cell["budget"], cell["arm"]


def span(values: list[float], digits: int) -> str:
    """Return mean and range."""
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
