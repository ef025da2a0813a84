"""How far an engine's answers may be off from PyTorch's in float32, by the precision it computes in."""

from collections.abc import Mapping

from edgeprune.errors import ProfileError
from edgeprune.profile import Profile

TOLERANCES: Mapping[str, tuple[float, float]] = {"fp32": (1e-4, 1e-3), "fp16": (2e-2, 2e-2)}
"""Precision → (absolute, as a share of the largest answer; relative).

Half precision rounds by 2**-11 an operation (IEEE 754 binary16); dozens of layers of it stay within the second pair.
"""


def tolerances(profile: Profile, largest: float) -> tuple[float, float]:
    """Return (absolute, relative): an answer passes if |got - want| <= absolute + relative |want|.

    Args:
        profile: of the target that answers.
        largest: magnitude of the largest answer.

    Raises:
        ProfileError: if nothing is known about the profile's precision.
    """
    if profile.precision not in TOLERANCES:
        raise ProfileError(
            f"profile {profile.name!r}: precision {profile.precision!r} cannot be deployed",
            why=f"how far its answers may be off is known for {' and '.join(TOLERANCES)} only",
            next_step='set precision = "fp16" or "fp32" in the target\'s table',
        )
    absolute, relative = TOLERANCES[profile.precision]
    return absolute * largest, relative
