"""What may be cut, and one decision to cut it.

A *unit* is the smallest set of channels that must go together: one channel in an ordinary network, one channel of
every group in a grouped convolution. A *channel group* is a run of interchangeable units; its width counts units.

    Space(groups=[Group("layer1.0.conv1", width=16, multiple=8)])
    Plan(kept={"layer1.0.conv1": (0, 1, 2, 5, 7, 8, 12, 15)})       width 8 of 16
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

from edgeprune.canonical import digest
from edgeprune.errors import PlanError


@dataclass(frozen=True, kw_only=True)
class Group:
    """One channel group.

    Attributes:
        name: the first layer, in forward order, whose output channels belong to it.
        width: number of units in the unpruned model.
        minimum: the fewest units a plan may keep (unless it removes the whole branch).
        multiple: kept widths are multiples of this many units; the full width is always allowed.
        unit_channels: channels in one unit.
        removable: width 0 is allowed: the group is the inside of a residual branch, which then disappears.
    """

    name: str
    width: int
    minimum: int
    multiple: int
    unit_channels: int = 1
    removable: bool = False

    @cached_property
    def choices(self) -> tuple[int, ...]:
        """Return the widths a plan may keep, ascending."""
        steps = set(range(self.multiple, self.width, self.multiple))
        allowed = {width for width in steps if width >= self.minimum} | {self.width}
        return tuple(sorted(allowed | ({0} if self.removable else set())))

    def nearest(self, width: float) -> int:
        """Return the allowed width closest to `width`; ties go to the wider."""
        return min(self.choices, key=lambda choice: (abs(choice - width), -choice))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One frozen choice of kept units per group: total over its space, ascending, hashable by `digest`.

    Attributes:
        kept: group → units that stay.
        repair: group → coefficient, in [0, 1], of the reconstruction that makes up for the units that go; empty: the
            method's own for every group. It changes weights, never shapes: plans that differ in it are equally fast.
    """

    kept: Mapping[str, tuple[int, ...]]
    repair: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept", MappingProxyType({name: tuple(units) for name, units in self.kept.items()}))
        object.__setattr__(self, "repair", MappingProxyType({name: float(each) for name, each in self.repair.items()}))

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def digest(self) -> str:
        """Return the SHA-256 that names this plan."""
        return digest(self.to_json())

    @property
    def widths(self) -> dict[str, int]:
        """Return group → number of kept units."""
        return {name: len(units) for name, units in self.kept.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values: group → units, and where there is a repair, both by their names."""
        kept = {name: list(units) for name, units in sorted(self.kept.items())}
        return {"kept": kept, "repair": dict(sorted(self.repair.items()))} if self.repair else kept

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Plan":
        """Return the plan that `to_json` wrote."""
        kept, repair = value, {}
        if isinstance(value.get("kept"), Mapping):  # units are a list: no group is taken for this
            kept, repair = value["kept"], value["repair"]
        return cls(kept={name: tuple(units) for name, units in kept.items()}, repair=repair)


@dataclass(frozen=True, kw_only=True)
class Space:
    """Everything a plan may decide: the channel groups in forward order."""

    groups: tuple[Group, ...]

    @cached_property
    def by_name(self) -> dict[str, Group]:
        """Return group name → group."""
        return {group.name: group for group in self.groups}

    def full(self) -> Plan:
        """Return the plan that keeps everything."""
        return Plan(kept={group.name: tuple(range(group.width)) for group in self.groups})

    def check(self, plan: Plan) -> Plan:
        """Return `plan` if it is total, ascending, in range and on allowed widths.

        Raises:
            PlanError: naming the first group that is wrong.
        """
        if unknown := sorted(set(plan.kept) ^ set(self.by_name)):
            raise PlanError(f"plan and space differ on groups {unknown[:3]}", next_step="make the plan from this space")
        for group in self.groups:
            _check_group(group, plan.kept[group.name])
        for name, coefficient in plan.repair.items():
            if name not in self.by_name or not 0 <= coefficient <= 1:
                raise PlanError(f"group {name!r}: its repair is {coefficient}", why="it is a share, 0 to 1, of a group")
        return plan


def _check_group(group: Group, kept: tuple[int, ...]) -> None:
    if list(kept) != sorted(set(kept)):
        raise PlanError(f"group {group.name!r}: kept units are not ascending and distinct")
    if kept and not (kept[0] >= 0 and kept[-1] < group.width):
        raise PlanError(f"group {group.name!r}: kept units outside 0..{group.width - 1}")
    if len(kept) not in group.choices:
        raise PlanError(f"group {group.name!r}: width {len(kept)} is not one of {list(group.choices)}")
