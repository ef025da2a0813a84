"""Energy of one inference: rails and load on the board's own clock, because ours is another.

tegrastats   │···········│▁▂████████████│··
trtexec      │  idle     │ load, warm-up │ calls │
                                          ◀ window ▶     cut by the log's own lines, stamped on the board
"""

import re

from . import _jetson_stats, _trtexec_log  # noqa: TID251 private parts of this adapter

ENERGY_SCRIPT = r"""
cd -- "$1" || exit 96
idle=$2 every=$3; shift 3
stamp() { while IFS= read -r line; do printf '%s %s\n' "${EPOCHREALTIME:-$(date +%s.%N)}" "$line"; done; }
tegrastats --interval "$every" 2> /dev/null | stamp & meter=$!
sleep "$idle"
printf '%s EDGEPRUNE_LOAD\n' "${EPOCHREALTIME:-$(date +%s.%N)}"
"$@" 2>&1 | stamp
kill "$meter" 2> /dev/null
exit 0
"""
"""Prints the lines of tegrastats and of trtexec, each behind the second of the board's clock at which it came."""

_INFERENCE_BEGINS, _INFERENCE_ENDS = "Starting inference", "Timing trace has"
MARGIN_S = 0.2
"""At both ends of a window, for lines that come late."""


def energy_from_text(text: str, *, idle_s: float, warm_up_s: float) -> _jetson_stats.Energy | None:
    """Return the energy of one inference from stamped lines of tegrastats and trtexec, None if they do not hold it."""
    stamped = []
    for line in text.splitlines():
        second, _, rest = line.partition(" ")
        if re.fullmatch(r"\d{1,12}[.,]\d{1,9}", second):
            stamped.append((float(second.replace(",", ".")), rest))
    load = next((at for at, rest in stamped if rest == "EDGEPRUNE_LOAD"), None)
    begin = next((at for at, rest in stamped if _INFERENCE_BEGINS in rest), None)
    end = next((at for at, rest in stamped if _INFERENCE_ENDS in rest), None)
    log = _trtexec_log.log_from_text("\n".join(rest for _, rest in stamped))
    if load is None or begin is None or end is None or not log.queries or not log.passed:
        return None
    start, stop = begin + warm_up_s, end
    inside = stop - start
    if inside <= 2 * MARGIN_S:
        return None
    readings = [(at, found) for at, rest in stamped if (found := _jetson_stats.reading_from_line(rest)) is not None]
    busy = (start + MARGIN_S, stop - MARGIN_S)
    count = round(log.queries * (busy[1] - busy[0]) / inside)
    return _jetson_stats.energy(readings, idle=(load - idle_s, load - MARGIN_S), busy=busy, inferences=count)
