"""Every method takes the embedded example to a verified bundle within its budget.

    python benchmarks/papers/smoke.py --out benchmarks/results/papers/smoke.json

Each line is one `edgeprune deploy` and one `edgeprune verify` in processes of their own. The exit code is 1 if a budget
is missed, a bundle does not verify, or a deploy takes longer than 8 minutes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import raw_results

ROOT = Path(__file__).parents[2]
LIMIT_S = 8 * 60

CASES: dict[str, tuple[str, ...]] = {
    "amc": ("--method", "amc"),
    "entropy-rl": ("--method", "entropy-rl"),
    "autodfp": ("--method", "autodfp"),
    "autodfp, data-free": ("--method", "autodfp", "--data-free"),
    "paoding": ("--method", "paoding"),
    "paoding, data-free": ("--method", "paoding", "--data-free"),
    "decay, group-norm": ("--finetune", "decay", "--host", "group-norm"),
    "decay, gates": ("--finetune", "decay", "--host", "gates"),
    "decay, half-space": ("--finetune", "decay", "--host", "half-space"),
}


def main() -> None:
    """Run the cases and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/papers/smoke.json")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--budget", default="0.5x")
    chosen = parser.parse_args()
    known = json.loads(chosen.out.read_text())["cases"] if chosen.out.is_file() else {}
    for name in chosen.cases:
        with tempfile.TemporaryDirectory() as folder:
            known[name] = run(CASES[name], chosen, Path(folder))
        print(f"{name}: {line(known[name])}", flush=True)
        raw_results.keep(chosen.out, {**raw_results.about(), "limit_s": LIMIT_S, "cases": known})
    sys.exit(not all(known[name]["fine"] for name in chosen.cases))


def run(flags: tuple[str, ...], chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return what one deploy and the verification of its bundle came to."""
    config = str(ROOT / "examples/fashion/edgeprune.toml")
    common = ("--config", config, "--budget", chosen.budget, "--trials", str(chosen.trials), "--out", str(folder))
    started = time.monotonic()
    code, deployed = edgeprune("deploy", *common, *flags)
    seconds = time.monotonic() - started
    if deployed["data"] is None or "bundle" not in deployed["data"]:
        return {"flags": flags, "fine": False, "exit": code, "said": deployed["diagnostics"], "seconds": seconds}
    outcome = deployed["data"]
    verified, _ = edgeprune("verify", outcome["bundle"])
    facts = {name: outcome[name] for name in ("baseline", "result", "budget", "tested_on", "measurements", "strategy")}
    fine = code == 0 and verified == 0 and seconds <= LIMIT_S
    return {"flags": flags, "fine": fine, "exit": code, "verified": verified == 0, "seconds": seconds, **facts}


def edgeprune(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the envelope of a command."""
    command = [sys.executable, "-m", "edgeprune", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return done.returncode, json.loads(done.stdout)


def line(case: dict[str, Any]) -> str:
    """Return what is worth reading of a case."""
    if "result" not in case:
        return f"exit {case['exit']}: {case['said']}"
    before, after = case["baseline"]["accuracy"], case["result"]["accuracy"]
    kept = "met" if case["budget"]["met"] else "MISSED"
    checked = "verified" if case["verified"] else "NOT VERIFIED"
    return (
        f"{100 * before:.2f} -> {100 * after:.2f} % of {case['tested_on']} at {case['result']['ratio']['p50']:.3f}x, "
        f"budget {kept}, {checked}, {case['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
