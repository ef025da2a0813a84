"""What *good enough* means: a hard latency limit, and what may be paid for it."""

import re
from dataclasses import asdict, dataclass
from typing import Literal

from edgeprune.errors import BudgetError

_PATTERN = re.compile(r"\s*(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d{1,2})?)\s*(?P<unit>x|us|ms|s)\s*")
_TO_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


@dataclass(frozen=True, kw_only=True)
class Latency:
    """A limit in milliseconds, or as a ratio of the unpruned model on the same device."""

    value: float
    unit: Literal["ms", "x"]

    @classmethod
    def parse(cls, text: str) -> "Latency":
        """Return the limit written as ``8ms``, ``800us``, ``0.008s`` or ``0.5x``.

        Raises:
            BudgetError: if it is none of these, or not positive, or a ratio of 1 or more.
        """
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise BudgetError(
                f"budget {text!r} is not a latency", next_step="write 8ms, 800us or 0.5x (of the unpruned model)"
            )
        number, unit = float(match["number"]), match["unit"]
        if number <= 0:
            raise BudgetError(f"budget {text!r} is not positive", next_step="write 8ms, 800us or 0.5x")
        if unit == "x" and number >= 1:
            raise BudgetError(
                f"budget {text!r} asks for no speed-up", next_step="write a ratio below 1, for example 0.5x"
            )
        return cls(value=number, unit="x") if unit == "x" else cls(value=number * _TO_MS[unit], unit="ms")

    def __str__(self) -> str:
        return f"{self.value:g}{self.unit}"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The promise a result must keep.

    Attributes:
        latency: hard limit; it counts as met only when the upper end of the interval is under it.
        quantile: which quantile of the latency the limit speaks of, in (0, 1).
        confidence: of the interval, in (0, 1).
        max_accuracy_drop: largest tolerated loss of accuracy after fine-tuning, as a fraction; None: any.
        size_mib: largest tolerated ONNX file, MiB; None: any.
    """

    latency: Latency
    quantile: float = 0.5
    confidence: float = 0.95
    max_accuracy_drop: float | None = None
    size_mib: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise BudgetError(f"quantile {self.quantile} is not between 0 and 1")
        if not 0.5 <= self.confidence < 1:
            raise BudgetError(f"confidence {self.confidence} is not in [0.5, 1)")

    def limit_ratio(self, baseline_ms: float) -> float:
        """Return the limit as a ratio of the unpruned model, whose latency is `baseline_ms` milliseconds."""
        return self.latency.value if self.latency.unit == "x" else self.latency.value / baseline_ms

    def to_json(self) -> dict[str, object]:
        """Return the budget as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, object]) -> "Budget":
        """Return the budget that `to_json` wrote."""
        fields = dict(value)
        latency = fields.pop("latency")
        assert isinstance(latency, dict)
        return cls(latency=Latency(**latency), **fields)  # type: ignore[arg-type]
