"""Logs and files of trtexec, whole, torn, and made by somebody who means ill."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.targets._trtexec_log import (
    Log,
    Unreadable,
    failure_of,
    layer_times_from_json,
    layers_by_graph_node,
    log_from_text,
    output_from_raw_name,
    outputs_from_json,
    precisions_from_layer_info,
    safe_file_name,
    times_from_json,
)

REPLAY = Path(__file__).parent / "replay"
PASSED = "&&&& PASSED TensorRT.trtexec [TensorRT v100300] # trtexec\n"


def failing(line: str, rc: int = 1) -> str:
    """Return the kind of the failure that a log with one error of this text is."""
    found = failure_of(rc, log_from_text(f"[11/21/2026-20:01:02] [E] {line}\n&&&& FAILED TensorRT.trtexec\n"))
    assert found is not None
    return found.kind


def test_a_summary_with_one_percentile_is_read() -> None:
    log = log_from_text((REPLAY / "xavier_8400.txt").read_text())
    assert log.passed
    assert str(log.version) == "8.4.0"
    assert log.summary["gpu compute time"] == {
        "min": 0.375977,
        "max": 0.403564,
        "mean": 0.388221,
        "median": 0.388443,
        "percentile(99%)": 0.393188,
    }
    assert log.summary["enqueue time"]["median"] == 0.0871582


def test_a_summary_with_three_percentiles_device_and_warnings_is_read() -> None:
    log = log_from_text((REPLAY / "orin_101300.txt").read_text())
    assert str(log.version) == "10.13.0"
    assert log.summary["latency"]["percentile(95%)"] == 76.446
    assert (log.queries, log.built_s) == (720, 5.8239)
    assert log.device == {"selected device": "Orin", "compute capability": "8.7", "sms": "16"}
    assert [each.split()[0] for each in log.warnings] == ["Tactic", "*", "*"]
    assert log.errors == ()


def test_line_ends_of_another_system_and_foreign_lines_change_nothing() -> None:
    text = (REPLAY / "orin_101300.txt").read_text()
    torn = "\n".join(f"{line}\nlibnvrm: hello" for line in text.splitlines())
    assert log_from_text(text.replace("\n", "\r\n")) == log_from_text(text) == log_from_text(torn)


@given(st.text(max_size=400), st.integers(0, 255))
def test_no_text_breaks_the_reader_and_none_without_the_last_line_passes(text: str, rc: int) -> None:
    log = log_from_text(text)
    assert log.passed or failure_of(rc, log) is not None


@given(st.integers(0, 1200))
def test_a_torn_log_is_read_as_far_as_it_goes(length: int) -> None:
    text = (REPLAY / "orin_101300.txt").read_text()[:length]
    assert not log_from_text(text).passed


def test_a_log_that_passed_with_another_status_is_a_failure() -> None:
    assert failure_of(0, log_from_text(PASSED)) is None
    assert failure_of(1, log_from_text(PASSED)) is not None
    assert failure_of(0, Log(passed=False, version=None)) is not None


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("ModelImporter.cpp:771: While parsing node number 3 [Einsum]:", "graph"),
        ("Could not find any implementation for node conv1.", "graph"),
        ("1: [defaultAllocator.cpp::allocate::19] Error Code 1: Cuda Runtime (out of memory)", "memory"),
        ("Cuda failure: no CUDA-capable device is detected", "device"),
        ("The engine plan file is not compatible with this version of TensorRT, please rebuild.", "stale"),
        ("generated on an incompatible device, expecting compute 8.6 got compute 7.5", "stale"),
        ("TimingCache creation failed", "cache"),
        ("Saving engine to file failed: No space left on device", "disk"),
        ("Unknown option: --fp16 ", "option"),
    ],
)
def test_a_failure_has_a_kind(line: str, kind: str) -> None:
    assert failing(line) == kind
    assert failing(f"[TRT] {line}") == kind


@pytest.mark.parametrize(("rc", "kind"), [(137, "memory"), (135, "memory"), (143, "ended"), (139, "graph")])
def test_a_signal_has_a_kind(rc: int, kind: str) -> None:
    found = failure_of(rc, log_from_text(""))
    assert found is not None
    assert found.kind == kind


def test_a_tactic_that_lacks_memory_is_a_warning_and_no_failure() -> None:
    assert failure_of(0, log_from_text((REPLAY / "orin_101300.txt").read_text())) is None


def test_a_precision_that_was_dropped_is_a_failure_although_it_passed() -> None:
    line = "Invalid usage, setting FP16 mode is not allowed if graph is strongly typed. Disabling fp16."
    found = failure_of(0, log_from_text(f"[11/21/2026-20:01:02] [W] {line}\n{PASSED}"))
    assert found is not None
    assert found.kind == "option"


# -- times ----------------------------------------------------------------------------------------------------------

CALL = (
    '{ "startEnqMs" : 0.0112, "endEnqMs" : 0.0251, "startH2dMs" : 0.0307, "endH2dMs" : 0.0307, '
    '"startComputeMs" : 0.0307, "endComputeMs" : 0.3911, "startD2hMs" : 0.3911, "endD2hMs" : 0.3911, '
    '"h2dMs" : 0, "computeMs" : 0.3604, "d2hMs" : 0, "latencyMs" : 0.3604 }'
)


def test_times_of_calls_are_read_in_order() -> None:
    times = times_from_json(f"[\n  {CALL}\n, {CALL.replace('0.3604', '0.25').replace('0.3911', '1000.0')}\n]\n")
    assert times.compute_ms == times.latency_ms == (0.3604, 0.25)
    assert times.enqueue_ms == pytest.approx((0.0139, 0.0139))
    assert times.span_s == pytest.approx(1.0, rel=1e-3)
    assert times.step_ms == pytest.approx(0.1104)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "[1]",
        f"[{CALL}",
        CALL,
        f"[{CALL.replace('0.3604', 'nan')}]",
        f"[{CALL.replace('0.3604', '-1')}]",
        f"[{CALL.replace('0.3604', '0')}]",
        f"[{CALL.replace('0.3604', 'true')}]",
        f"[{CALL.replace('computeMs', 'ComputeMs')}]",
        f"[{CALL.replace('0.3604', '1e999')}]",
        f"[{CALL.replace('0.3604', '9' * 400)}]",
        f"[{CALL.replace('0.3604', '9' * 5000)}]",
        f"[{CALL.replace('0.3604', '1e305')}]",
        "[" * 100_000,
    ],
    ids=range(16),
)
def test_times_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(Unreadable):
        times_from_json(text)


# -- layers ---------------------------------------------------------------------------------------------------------

PROFILE = r"""[
  { "count" : 2094 }
, { "name" : "Reformatting CopyNode for Input Tensor 0 to a + b", "timeMs" : 16.15, "averageMs" : 0.0077, "medianMs" : 0.0075 }
, { "name" : "conv1 + relu1", "timeMs" : 47.82, "averageMs" : 0.0228, "medianMs" : 0.0225, "percentage" : 1.6 }
, { "name" : "an "odd" \name", "timeMs" : 1, "averageMs" : 0.5, "percentage" : 0.1 }
]
"""  # noqa: E501 as trtexec writes it


def test_times_of_layers_are_read_even_where_names_break_json() -> None:
    found = layer_times_from_json(PROFILE)
    assert list(found.values()) == [0.0075, 0.0225, 0.5]
    assert 'an "odd" \\name' in found


@pytest.mark.parametrize("text", ["", "[]", '[ { "count" : 3 } ]'])
def test_a_profile_without_layers_is_refused(text: str) -> None:
    with pytest.raises(Unreadable):
        layer_times_from_json(text)


def test_a_fused_layer_belongs_to_the_first_of_its_nodes() -> None:
    layers = {
        "/layer1/conv1/Conv + /layer1/relu/Relu": 3.0,
        "PWN(/sigmoid)": 1.0,
        "Reformatting CopyNode for Input Tensor 0 to /layer1/conv1/Conv": 0.5,
        "{ForeignNode[a.../b]}": 2.0,
        "fc [profile 0]": 4.0,
    }
    nodes = ["/layer1/conv1/Conv", "/layer1/relu/Relu", "/sigmoid", "fc"]
    found = layers_by_graph_node(layers, nodes)
    assert found["/layer1/conv1/Conv"] == 3.0
    assert found["/sigmoid"] == 1.0
    assert found["fc"] == 4.0
    assert sum(found.values()) == sum(layers.values())


def test_precisions_are_counted_from_the_formats_of_tensors() -> None:
    formats = [
        "Row major linear FP32",
        "Channel major FP16 format where channel % 8 == 0",
        "Half",
        "Int8 NC/32HW32",
        "Thirty-two wide channel vectorized row major Int8 format",
        "BFloat16",
        "Bool",
    ]
    text = ",".join(f'{{"Outputs": [{{"Format/Datatype": "{each}"}}]}}' for each in formats)
    assert precisions_from_layer_info(text) == {"fp32": 1, "fp16": 2, "int8": 2, "bf16": 1}
    assert precisions_from_layer_info('{"Layers": ["conv1"], "Bindings": []}') == {}


# -- outputs --------------------------------------------------------------------------------------------------------


def test_outputs_in_json_are_read_with_what_json_has_no_word_for() -> None:
    text = '[\n  { "name" : "y", "dimensions" : "(1, 4)", "values" : [ 0.12, nan, -inf, 3 ] }\n]\n'
    np.testing.assert_equal(outputs_from_json(text)["y"], np.array([[0.12, np.nan, -np.inf, 3]], np.float32))


@pytest.mark.parametrize(
    "text",
    [
        '[ { "name" : "y", "dimensions" : "(2, 4)", "values" : [ 1 ] } ]',
        '[ { "dimensions" : "(1)", "values" : [ 1 ] } ]',
        '[ { "name" : "y", "dimensions" : "(1)", "values" : "x" } ]',
        '[ { "name" : "y" } ]',
        f'[ {{ "name" : "y", "dimensions" : "(1)", "values" : [ {"9" * 400} ] }} ]',
        f'[ {{ "name" : "y", "dimensions" : "({"9" * 400})", "values" : [ 1 ] }} ]',
        f'[ {{ "name" : "y", "dimensions" : "({"9" * 5000})", "values" : [ 1 ] }} ]',
        "not json",
    ],
    ids=range(8),
)
def test_outputs_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(Unreadable):
        outputs_from_json(text)


def test_the_name_of_a_raw_file_tells_type_and_shape() -> None:
    assert output_from_raw_name("y.output.1.10.Float.raw") == ("y", "<f4", (1, 10))
    assert output_from_raw_name("a.output.b.output.2.Half.raw") == ("a.output.b", "<f2", (2,))
    assert output_from_raw_name("s.output.Int64.raw") == ("s", "<i8", ())


@pytest.mark.parametrize(
    "name",
    [
        "y.raw",
        "y.output.1.Complex.raw",
        "y.output.99999999.99999.Float.raw",
        f"y.output.{'9' * 5000}.Float.raw",
        f"y.output.{'1.' * 100}Float.raw",
        "../y",
        "",
    ],
    ids=range(7),
)
def test_a_file_that_is_no_output_is_refused(name: str) -> None:
    with pytest.raises(Unreadable):
        output_from_raw_name(name)


@given(st.text(min_size=1, max_size=30))
def test_a_safe_file_name_has_no_separator(name: str) -> None:
    assert len(safe_file_name(name)) == len(name)
    assert not set(safe_file_name(name)) & set("/\\ :'\"\n\0")
