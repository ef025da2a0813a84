"""One convolution or linear layer as cost sees it: whose channels go in, whose come out, how much work a pair costs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer of the unpruned graph.

    Attributes:
        name: module path, e.g. "layer1.0.conv1".
        node: ONNX node name.
        kind: "conv", "depthwise", "grouped", "transposed" or "linear".
        in_channels, out_channels: of the unpruned layer (of the whole layer, all convolution groups together).
        kernel: product of the kernel's sides, 1 for linear.
        stride: of the first spatial axis, 1 for linear.
        height, width: of the map whose every place costs one kernel: the output, the input if transposed; 1 for linear.
        groups: convolution groups.
        in_units, out_units: channel-group name → channels that one of its units contributes to this axis;
            channels not in any group are fixed.
        gone_with: channel groups whose removal (width 0) takes the whole layer away.
    """

    name: str
    node: str
    kind: str
    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    height: int
    width: int
    groups: int = 1
    in_units: Mapping[str, int] = field(default_factory=dict)
    out_units: Mapping[str, int] = field(default_factory=dict)
    gone_with: tuple[str, ...] = ()

    def gone(self, widths: Mapping[str, int]) -> bool:
        """Return whether the layer is part of a branch that these widths remove."""
        return any(widths[name] == 0 for name in self.gone_with)

    def channels(self, widths: Mapping[str, int], full: Mapping[str, int]) -> tuple[int, int]:
        """Return (in, out) channels when each channel group keeps `widths` of its `full` units."""
        if self.gone(widths):
            return 0, 0
        lost_in = sum((full[name] - widths[name]) * per for name, per in self.in_units.items())
        lost_out = sum((full[name] - widths[name]) * per for name, per in self.out_units.items())
        return self.in_channels - lost_in, self.out_channels - lost_out

    def macs(self, widths: Mapping[str, int], full: Mapping[str, int], multiple: int = 1) -> float:
        """Return multiply-accumulates at these widths, channels rounded up to `multiple` as blocked kernels do.

        Padding counts as if it were pixels.
        """
        into, out = (math.ceil(each / multiple) * multiple for each in self.channels(widths, full))
        per_out = 1.0 if self.kind == "depthwise" else into / self.groups
        return out * per_out * self.kernel * self.height * self.width

    def groups_left(self, widths: Mapping[str, int], full: Mapping[str, int]) -> int:
        """Return the convolution groups left; a depthwise layer has one per channel."""
        return max(1, self.channels(widths, full)[0]) if self.kind == "depthwise" else self.groups
