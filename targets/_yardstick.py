"""How fast a sentinel is on a device: it shows throttling and company without any sensor."""

from statistics import median

from edgeprune.errors import Unstable

SLOW_NOTED, SLOW_LIMIT = 1.1, 1.3
"""A sentinel that takes this many times as long as before is worth a flag; spoils the measurement."""

CALIBRATION_RUNS = 5
"""Measurements whose sentinel times are the yardstick for the rest of the connection."""


class Yardstick:
    """How fast each sentinel was in the first measurements of a connection; it shows throttling without a sensor.

    Args:
        limit: a sentinel that takes more than this many times as long spoils the measurement.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._known: dict[str, list[float]] = {}

    def compare(self, sentinel: str, took_ms: float) -> list[str]:
        """Return a flag if the sentinel is notably slower than before.

        Raises:
            Unstable: if it is slower than the limit.
        """
        known = self._known.setdefault(sentinel, [])
        slower = took_ms / median(known) if known else 1.0
        if slower > self._limit:
            raise Unstable(
                f"the sentinel took {slower:.2f} times as long as before",
                why="the machine is throttled or shared with something heavy",
                next_step="let it cool down or end what else it does, then run the command again",
            )
        if len(known) < CALIBRATION_RUNS:
            known.append(took_ms)
        return [f"machine slow: the sentinel took {slower:.2f} times as long as before"] if slower > SLOW_NOTED else []
