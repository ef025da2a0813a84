"""What a deploy came to, in words."""

import pytest

from edgeprune.outcome import runtime_line


def chosen(p50: float | None) -> dict[str, object]:
    times = None if p50 is None else {"p50": p50, "low": p50, "high": p50}
    return {"runtime": "tvm", "runtimes": {"chosen": "tvm", "other": "onnxruntime", "graph": "g", "times": times}}


@pytest.mark.parametrize(
    ("p50", "emulated", "wanted"),
    [
        (1.238, False, "tvm, 1.24x faster than onnxruntime"),
        (0.5, False, "tvm, 2.00x slower than onnxruntime"),
        (1.68, True, "tvm; onnxruntime takes 1.68x its instructions"),
        (None, False, "tvm; onnxruntime refuses the model"),
    ],
)
def test_the_chosen_runtime_is_named_with_what_the_other_takes(p50: float | None, emulated: bool, wanted: str) -> None:
    assert runtime_line(chosen(p50), emulated=emulated) == wanted


def test_where_nothing_was_chosen_nothing_is_said() -> None:
    assert runtime_line({"runtime": "onnxruntime"}, emulated=False) == ""
