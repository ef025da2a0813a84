"""The alphabet of our pictures: cleaned text, axes, frames and SVG elements.

20 ┤····●·····          a `Frame` maps two `Axis` to pixels
10 ┤·●········          colours are classes, so the page's style decides light and dark
   └──┬───────┬─
     0.4     0.6
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from edgeprune import quantities

# Everything a terminal or a browser could act on: escape sequences, C0 and C1 controls but tab and newline, overrides
# of writing direction, and surrogates, which UTF-8 cannot carry.
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?")
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
_SURROGATES = re.compile("[\ud800-\udfff]")


def clean(text: str) -> str:
    """Return `text` without control characters and escape sequences, surrogates replaced."""
    return _SURROGATES.sub("\ufffd", _CONTROLS.sub("", _ESCAPES.sub("", text)))


SMALLEST = 1e-9
"""A difference that no axis shows: its ticks would differ in digits nobody reads, or not at all."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One direction of a plot, in the unit that is printed."""

    low: float
    high: float
    ticks: tuple[float, ...]
    title: str

    @classmethod
    def over(cls, values: Iterable[float], title: str, *, about: int = 5, pad: float = 0.04) -> "Axis":
        """Return an axis that holds all `values` with a share `pad` of room at both ends."""
        seen = list(values) or [0.0, 1.0]
        low, high = min(seen), max(seen)
        size = max(abs(low), abs(high))
        room = (high - low) * pad
        if high - low <= SMALLEST * max(1.0, size):
            room = size * 0.1 if size > SMALLEST else 1.0
        low, high = low - room, high + room
        return cls(low=low, high=high, ticks=nice_ticks(low, high, about), title=title)

    @classmethod
    def from_zero(cls, values: Iterable[float], title: str, *, about: int = 4) -> "Axis":
        """Return an axis from 0 to a little over the largest of `values`."""
        largest = max(values, default=0.0)
        high = largest * 1.08 if largest > SMALLEST else 1.0
        return cls(low=0.0, high=high, ticks=nice_ticks(0.0, high, about), title=title)

    def write(self, tick: float) -> str:
        """Return the text of a tick, with the decimals its neighbours need."""
        largest = max(abs(self.low), abs(self.high))
        size, prefix = quantities.prefix_of(largest) if largest >= 1e5 else (1.0, "")
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else abs(tick) or 1.0
        text = quantities.fixed(tick / size, max(0, -math.floor(math.log10(step / size) + 1e-9)))
        return text + quantities.NBSP + prefix if prefix else text


def nice_ticks(low: float, high: float, about: int = 5) -> tuple[float, ...]:
    """Return multiples of 1, 2 or 5 times a power of ten inside [low, high], about `about` of them."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(float(f"{k * step:.12g}") for k in range(first, last + 1))


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A plot's rectangle inside a drawing of `width` × `height`, with an axis each way."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x: Axis
    y: Axis

    def px(self, value: float) -> float:
        """Return the horizontal place of `value`."""
        share = (value - self.x.low) / (self.x.high - self.x.low)
        return self.left + share * (self.width - self.left - self.right)

    def py(self, value: float) -> float:
        """Return the vertical place of `value`, down being positive."""
        share = (value - self.y.low) / (self.y.high - self.y.low)
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)

    @property
    def floor(self) -> float:
        """Return the vertical place of the plot's lower edge."""
        return self.height - self.bottom

    @property
    def edge(self) -> float:
        """Return the horizontal place of the plot's right edge."""
        return self.width - self.right


def framed(width: float, height: float, x: Axis, y: Axis, *, right: float = 14, top: float = 30) -> Frame:
    """Return a frame whose left margin fits the numbers beside the vertical axis."""
    left = 12 + 7.2 * max((len(y.write(tick)) for tick in y.ticks), default=1)
    return Frame(width=width, height=height, left=left, right=right, top=top, bottom=44, x=x, y=y)


def tag(name: str, *children: str, **attributes: object) -> str:
    """Return one element; attribute values are cleaned and escaped, children are not."""
    written = "".join(f' {key.strip("_").replace("_", "-")}="{_attribute(each)}"' for key, each in attributes.items())
    return f"<{name}{written}>{''.join(children)}</{name}>"


def _attribute(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return escape(clean(str(value)))


def said(text: str, x: float, y: float, style: str = "", anchor: str = "start") -> str:
    """Return a text element, cleaned and escaped; its place is the baseline."""
    return tag("text", escape(clean(text)), x=x, y=y, class_=style, text_anchor=anchor)


def hint(text: str) -> str:
    """Return what the pointer is told over the element around it."""
    return tag("title", escape(clean(text)))


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    """Return a straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=style)


def path(corners: Iterable[tuple[float, float]], style: str) -> str:
    """Return a polyline, or nothing without corners."""
    steps = "L".join(f"{x:.1f} {y:.1f}" for x, y in corners)
    return tag("path", d=f"M{steps}", class_=style) if steps else ""


def drawing(width: float, height: float, label: str, *parts: str) -> Markup:
    """Return a whole picture that is at most `width` pixels wide; `label` is read out in its place."""
    box = f"0 0 {width:g} {height:g}"
    style = f"max-width:{width:g}px"
    return Markup(tag("svg", *parts, viewBox=box, style=style, role="img", aria_label=label))  # noqa: S704  escaped above


def axes(frame: Frame) -> str:
    """Return the rules, ticks and titles of a frame; the vertical title lies flat above its axis."""
    rules = [line(frame.left, frame.py(tick), frame.edge, frame.py(tick), "rule") for tick in frame.y.ticks]
    sides = [said(frame.y.write(tick), frame.left - 8, frame.py(tick) + 4, "tick", "end") for tick in frame.y.ticks]
    feet = [said(frame.x.write(tick), frame.px(tick), frame.floor + 18, "tick", "middle") for tick in frame.x.ticks]
    marks = [line(frame.px(tick), frame.floor, frame.px(tick), frame.floor + 4, "axis") for tick in frame.x.ticks]
    titles = [said(frame.y.title, 0, 12, "name"), said(frame.x.title, frame.edge, frame.height - 6, "name", "end")]
    base = line(frame.left, frame.floor, frame.edge, frame.floor, "axis")
    return "".join([*rules, *sides, *marks, *feet, base, *titles])
