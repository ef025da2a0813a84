"""What a sample counts, and the unit it is shown in: milliseconds where a clock ran, and nowhere else.

| metric                 | of one call                                     | shown in              |
|------------------------|-------------------------------------------------|-----------------------|
| latency_ns             | nanoseconds on the device                       | ms                    |
| emulated_instructions  | instructions that an emulated CPU executed      | M emulated instr.     |
| formula_ns             | what a formula says                             | formula units         |

One million of what is counted makes one unit, so that the same arithmetic serves all.
"""

from edgeprune.errors import BudgetError

LATENCY = "latency_ns"
EMULATED_INSTRUCTIONS = "emulated_instructions"
FORMULA = "formula_ns"

PER_UNIT = 1e6
"""Nanoseconds in a millisecond, instructions in a million of them."""

_UNITS = {LATENCY: "ms", EMULATED_INSTRUCTIONS: "M emulated instr.", FORMULA: "formula units"}


def unit_of(metric: str) -> str:
    """Return what a latency of this metric is printed in; a million of what an unknown metric counts."""
    return _UNITS.get(metric, f"M {metric}")


def limit_of(requested: str, metric: str) -> str:
    """Return a latency limit as the user wrote it, but no milliseconds where no clock gave any."""
    if metric != LATENCY and requested.endswith("ms"):
        return f"{requested.removesuffix('ms')} {unit_of(metric)}"
    return requested


def check_limit(requested: str, unit: str, metric: str) -> None:
    """Check that a latency limit can be compared with what a target counts.

    Args:
        requested: as the user wrote it.
        unit: "ms", or "x" for a ratio of the unpruned model.

    Raises:
        BudgetError: if milliseconds are asked of an emulator, which knows of no time. A formula imitates milliseconds,
            so it is held to them, in its own units.
    """
    if unit == "ms" and metric not in (LATENCY, FORMULA):
        raise BudgetError(
            f"the budget {requested} is a time, and this target counts no time",
            why=f"its latencies are in {unit_of(metric)}, which say nothing about milliseconds",
            next_step="write a ratio of the unpruned model, for example --budget 0.5x",
        )
