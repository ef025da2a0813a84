"""How near one model's answers come to another's, where there are no labels to ask."""

from torch import Tensor


def fidelity(student: Tensor, teacher: Tensor) -> float:
    """Return 1 / (1 + e²), e the error of the logits relative to their spread, 1 for equal ones and 0.5 at e = 1.

    Args:
        student, teacher: logits [N, classes]; of the teacher, the spread about each class's mean is what counts as 1.
    """
    wanted = teacher.double()
    spread = float((wanted - wanted.mean(0)).square().mean())
    error = float((student.double() - wanted).square().mean())
    return 1 / (1 + error / max(spread, 1e-30))
