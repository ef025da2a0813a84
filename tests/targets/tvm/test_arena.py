"""Memory is shared by what never lives at the same time, and by nothing else."""

from hypothesis import given
from hypothesis import strategies as st

from edgeprune.targets._tvm.arena import ALIGNMENT, Lifetime, aligned, plan


def test_a_chain_takes_turns_in_two_places() -> None:
    chain = [Lifetime(bytes=64, first=step, last=step + 1) for step in range(6)]
    offsets, total = plan(chain)
    assert offsets == (0, 64, 0, 64, 0, 64)
    assert total == 128


def test_a_shortcut_keeps_its_place() -> None:
    lives = [Lifetime(bytes=100, first=0, last=3), *(Lifetime(bytes=100, first=k, last=k + 1) for k in (1, 2))]
    assert plan(lives) == ((0, 128, 256), 384)


def test_nothing_needs_no_memory() -> None:
    assert plan([]) == ((), 0)


@given(
    st.lists(
        st.tuples(st.integers(1, 5000), st.integers(0, 20), st.integers(0, 8)).map(
            lambda each: Lifetime(bytes=each[0], first=each[1], last=each[1] + each[2])
        ),
        max_size=30,
    )
)
def test_tensors_that_live_together_never_overlap(lives: list[Lifetime]) -> None:
    offsets, total = plan(lives)
    spans = [(offset, offset + each.bytes) for offset, each in zip(offsets, lives, strict=True)]
    for place, (own, each) in enumerate(zip(spans, lives, strict=True)):
        assert own[0] % ALIGNMENT == 0
        assert own[1] <= total
        for other, beside in list(zip(spans, lives, strict=True))[:place]:
            together = each.first <= beside.last and beside.first <= each.last
            assert not together or own[1] <= other[0] or other[1] <= own[0]
    most = max((sum(aligned(x.bytes) for x in lives if x.first <= step <= x.last) for step in range(30)), default=0)
    assert most <= total <= sum(aligned(each.bytes) for each in lives)
