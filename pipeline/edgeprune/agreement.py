"""How near one model's answers come to another's, where there are no labels to ask."""

from torch import Tensor


def fidelity(student: Tensor, teacher: Tensor) -> float:
    """Return the cosine between two models' logits about the teacher's class means, 0 where it is negative.

    1 for equal answers, 1 / √(1 + e²) for an error of e times the teacher's spread that has nothing to do with it, 0
    for answers that do not depend on the image. A distance would not do: there a constant answer, with an error of 1,
    is nearer than a wrong one that is sure of itself, and a search ends with an empty network.

    Args:
        student, teacher: logits [N, classes].
    """
    centre = teacher.double().mean(0)
    one, other = (student.double() - centre).flatten(), (teacher.double() - centre).flatten()
    lengths = float(one.norm() * other.norm())
    if lengths == 0:
        return float(bool((one == other).all()))
    return min(1.0, max(0.0, float(one @ other) / lengths))
