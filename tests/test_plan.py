"""Plans are frozen, total and named by their digest; spaces say which are allowed."""

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import PlanError
from edgeprune.plan import Group, Plan, Space


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """Draw a space of up to six groups."""
    names = draw(st.lists(st.text("abc.0", min_size=1, max_size=6), unique=True, min_size=1, max_size=6))
    groups = []
    for name in names:
        width, multiple = draw(st.integers(1, 24)), draw(st.sampled_from([1, 2, 4, 8]))
        minimum = draw(st.integers(1, width))
        groups.append(Group(name=name, width=width, minimum=minimum, multiple=multiple, removable=draw(st.booleans())))
    return Space(groups=tuple(groups))


@st.composite
def spaces_and_plans(draw: st.DrawFn) -> tuple[Space, Plan]:
    """Draw a space and a plan it allows."""
    space = draw(spaces())
    kept = {}
    for group in space.groups:
        width = draw(st.sampled_from(group.choices))
        kept[group.name] = tuple(sorted(draw(st.permutations(range(group.width)))[:width]))
    repair = draw(st.dictionaries(st.sampled_from(sorted(kept)), st.floats(0, 1)))
    return space, Plan(kept=kept, repair=repair)


@settings(derandomize=True)
@given(spaces_and_plans())
def test_json_holds_the_whole_plan(drawn: tuple[Space, Plan]) -> None:
    """Through text and back it is the same plan with the same name, and still allowed."""
    space, plan = drawn
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.digest == plan.digest
    assert hash(again) == hash(plan)
    assert space.check(again) is again


@settings(derandomize=True)
@given(spaces_and_plans(), st.data())
def test_digests_are_equal_exactly_when_plans_are(drawn: tuple[Space, Plan], data: st.DataObject) -> None:
    """The order of the groups does not matter; one unit more or less does."""
    _, plan = drawn
    turned = Plan(kept=dict(reversed(plan.kept.items())), repair=dict(reversed(plan.repair.items())))
    assert turned == plan
    assert turned.digest == plan.digest
    name = data.draw(st.sampled_from(sorted(plan.kept)))
    other = Plan(kept={**plan.kept, name: (*plan.kept[name], 99)}, repair=plan.repair)
    assert other != plan
    assert other.digest != plan.digest
    repaired = Plan(kept=plan.kept, repair={**plan.repair, name: plan.repair.get(name, 0.25) / 2 + 0.125})
    assert (repaired.digest == plan.digest) == (repaired == plan)


@pytest.mark.parametrize("repair", [{"a": -0.1}, {"a": 1.1}, {"a": float("nan")}, {"c": 0.5}])
def test_a_repair_is_a_share_of_a_group_of_the_space(repair: dict[str, float]) -> None:
    space = Space(groups=(Group(name="a", width=1, minimum=1, multiple=1),))
    with pytest.raises(PlanError, match="repair"):
        space.check(Plan(kept={"a": (0,)}, repair=repair))


def test_a_group_may_be_called_like_a_field() -> None:
    plan = Plan(kept={"kept": (0,), "repair": (1, 2)})
    assert Plan.from_json(plan.to_json()) == plan


def test_digest_is_a_known_name() -> None:
    """SHA-256 of canonical JSON: it may never change, ledgers hold it."""
    plan = Plan(kept={"b": (0, 2), "a": ()})
    assert plan.digest == hashlib.sha256(b'{"a":[],"b":[0,2]}').hexdigest()


@settings(derandomize=True)
@given(spaces())
def test_full_plan_is_allowed_and_keeps_everything(space: Space) -> None:
    """The unpruned model is in every space."""
    full = space.check(space.full())
    assert full.widths == {group.name: group.width for group in space.groups}


@settings(derandomize=True)
@given(spaces_and_plans(), st.data())
def test_wrong_plans_are_refused_and_the_group_is_named(drawn: tuple[Space, Plan], data: st.DataObject) -> None:
    """A missing or foreign group, a unit twice, out of order, out of range, or a width that is not allowed."""
    space, plan = drawn
    group = data.draw(st.sampled_from(space.groups))
    units = plan.kept[group.name]
    wrong = {
        "twice": (*units, units[-1]) if units else (0, 0),
        "out of order": tuple(reversed(range(group.width))) if group.width > 1 else (1,),
        "too high": (*units, group.width),
        "negative": (-1, *units),
    }
    kind = data.draw(st.sampled_from([*wrong, "missing", "foreign"]))
    if kind == "missing":
        bad = {name: each for name, each in plan.kept.items() if name != group.name}
    elif kind == "foreign":
        bad = {**plan.kept, "elsewhere": ()}
    else:
        bad = {**plan.kept, group.name: wrong[kind]}
    with pytest.raises(PlanError) as refusal:
        space.check(Plan(kept=bad))
    assert ("elsewhere" if kind == "foreign" else group.name) in refusal.value.what


@settings(derandomize=True)
@given(spaces(), st.data())
def test_widths_off_the_grid_are_refused(space: Space, data: st.DataObject) -> None:
    """Exactly the choices of a group are allowed."""
    group = data.draw(st.sampled_from(space.groups))
    width = data.draw(st.integers(0, group.width))
    plan = Plan(kept={**space.full().kept, group.name: tuple(range(width))})
    if width in group.choices:
        assert space.check(plan) is plan
    else:
        with pytest.raises(PlanError, match="is not one of"):
            space.check(plan)


@settings(derandomize=True)
@given(spaces(), st.floats(-5, 40))
def test_nearest_is_a_choice_and_none_is_nearer(space: Space, wish: float) -> None:
    """Ties go to the wider."""
    for group in space.groups:
        found = group.nearest(wish)
        assert found in group.choices
        assert not [each for each in group.choices if abs(each - wish) < abs(found - wish)]
        assert not [each for each in group.choices if abs(each - wish) == abs(found - wish) and each > found]


@pytest.mark.parametrize(
    ("group", "choices"),
    [
        (Group(name="g", width=16, minimum=8, multiple=8), (8, 16)),
        (Group(name="g", width=20, minimum=1, multiple=8), (8, 16, 20)),
        (Group(name="g", width=16, minimum=9, multiple=8), (16,)),
        (Group(name="g", width=16, minimum=12, multiple=4, removable=True), (0, 12, 16)),
        (Group(name="g", width=3, minimum=1, multiple=1), (1, 2, 3)),
    ],
)
def test_choices(group: Group, choices: tuple[int, ...]) -> None:
    """Multiples from the minimum up, the full width, and nothing if the branch may go."""
    assert group.choices == choices


def test_plans_cannot_be_changed() -> None:
    """Neither the mapping nor what it was made of moves a plan."""
    source = {"a": [0, 1]}
    plan = Plan(kept=source)
    source["a"].append(2)
    source["b"] = []
    assert plan.kept == {"a": (0, 1)}
    with pytest.raises(TypeError):
        plan.kept["a"] = ()
    with pytest.raises(AttributeError):
        plan.kept = {}
