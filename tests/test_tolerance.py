import pytest

from edgeprune.errors import ProfileError
from edgeprune.profile import Profile
from edgeprune.tolerance import TOLERANCES, tolerances


def test_half_precision_may_be_off_by_more_than_single() -> None:
    (single, half) = (tolerances(Profile(name="t", adapter="a", precision=each), 10.0) for each in ("fp32", "fp16"))
    assert single == (1e-3, 1e-3)
    assert half == (0.2, 2e-2)
    assert all(absolute > 2**-11 for absolute, _ in [TOLERANCES["fp16"]])


def test_a_precision_of_unknown_error_is_refused() -> None:
    with pytest.raises(ProfileError, match="int4"):
        tolerances(Profile(name="t", adapter="a", precision="int4"), 1.0)
