from pathlib import Path

import numpy as np
import onnx
import pytest
from contract import convnet
from onnx import TensorProto, helper, numpy_helper

from edgeprune.artifact import TensorSpec
from edgeprune.comparison import compare, read_graph
from edgeprune.errors import CorruptArtifact, ModelError, ProfileError
from edgeprune.profile import Profile, load_profile

FORMULA = Profile(name="formula", adapter="formula", options={"noise": 0.0, "overhead_ns": 0.0})


def identity(path: Path, shape: tuple[object, ...], kind: int = TensorProto.FLOAT) -> Path:
    value = [helper.make_tensor_value_info(name, kind, shape) for name in "xy"]
    node = helper.make_node("Identity", ["x"], ["y"])
    onnx.save(helper.make_model(helper.make_graph([node], "g", value[:1], value[1:])), str(path))
    return path


def test_every_model_is_compared_with_the_first(tmp_path: Path) -> None:
    """Widths of 16 and 32 cost 1x, 2x and 3x of an inner layer, plus the first layer's 16 channels each."""
    paths = [convnet(tmp_path / f"{name}.onnx", widths, 16).path for name, widths in (("a", (64, 64)), ("b", (64, 32)))]
    paths.append(paths[0])
    worse, same = compare(paths, [FORMULA])
    assert (worse.path, worse.reference) == (paths[1], paths[0])
    layer = 256 * 9 * np.array([16 * 64, 64 * 64, 64 * 32]) / 16
    linear = np.array([64 * 16, 32 * 16]) / 16
    expected = (layer[0] + layer[2] + linear[1]) / (layer[0] + layer[1] + linear[0])
    assert worse.ratio.p50 == pytest.approx(expected, rel=1e-4)
    assert worse.reference_latency.p50 == pytest.approx((layer[0] + layer[1] + linear[0]) / 1e6, rel=1e-4)
    assert worse.latency.p50 / worse.reference_latency.p50 == pytest.approx(worse.ratio.p50)
    assert same.ratio.p50 == pytest.approx(1)
    assert worse.distinguishable
    assert not same.distinguishable


def test_a_single_model_is_compared_with_itself(tmp_path: Path) -> None:
    path = convnet(tmp_path / "a.onnx", (16, 16), 16).path
    (only,) = compare([path], [FORMULA])
    assert only.path == only.reference == path
    assert not only.distinguishable
    assert only.measurement.artifact_sha256 == only.measurement.reference_sha256


def test_this_machine_tells_four_times_the_work_apart(tmp_path: Path) -> None:
    paths = [convnet(tmp_path / f"{width}.onnx", (width, width)).path for width in (16, 64)]
    (wide,) = compare(paths, [load_profile("host")], seconds=0.5)
    assert wide.ratio.low > 1.5
    assert wide.latency.p50 > wide.reference_latency.p50
    facts = wide.to_json()
    assert facts["distinguishable"]
    assert facts["metric"] == "latency_ns"
    assert not facts["emulated"]


def test_more_seconds_are_more_sessions(tmp_path: Path) -> None:
    path = convnet(tmp_path / "a.onnx", (16, 16), 16).path
    counts = [len(compare([path], [FORMULA], seconds=each)[0].measurement.sessions) for each in (0.1, 2.0, 10.0)]
    assert counts == [3, 6, 30]


def test_progress_is_told_before_each_model_and_at_the_end(tmp_path: Path) -> None:
    paths = [convnet(tmp_path / f"{width}.onnx", (width, 16), 16).path for width in (16, 32, 64)]
    told: list[tuple[str, int, int]] = []
    compare(paths, [FORMULA], progress=lambda *each: told.append(each))
    assert told == [("32.onnx", 0, 2), ("64.onnx", 1, 2), ("", 2, 2)]


def test_the_inputs_of_a_file_are_read_with_shape_and_type(tmp_path: Path) -> None:
    assert read_graph(identity(tmp_path / "i.onnx", (2, 3), TensorProto.INT64)).inputs == (
        TensorSpec(name="x", shape=(2, 3), dtype="int64"),
    )


def test_a_first_axis_of_unknown_size_is_a_batch_of_one(tmp_path: Path) -> None:
    assert read_graph(identity(tmp_path / "i.onnx", ("batch", 3))).inputs[0].shape == (1, 3)


def test_another_axis_of_unknown_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no fixed shape.*'width'"):
        read_graph(identity(tmp_path / "i.onnx", (1, "width")))


def test_constants_that_are_declared_as_inputs_are_not_inputs(tmp_path: Path) -> None:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (4,)) for name in "xwy"]
    constant = numpy_helper.from_array(np.ones(4, np.float32), "w")
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", value[:2], value[2:], [constant])
    onnx.save(helper.make_model(graph), str(tmp_path / "g.onnx"))
    assert [each.name for each in read_graph(tmp_path / "g.onnx").inputs] == ["x"]


def test_weights_in_another_file_are_refused(tmp_path: Path) -> None:
    net = convnet(tmp_path / "net.onnx", (16, 16))
    onnx.save(
        onnx.load(str(net.path)),
        str(tmp_path / "split.onnx"),
        save_as_external_data=True,
        location="w",
        size_threshold=0,
    )
    with pytest.raises(ModelError, match="other files"):
        read_graph(tmp_path / "split.onnx")


def test_a_missing_file_is_the_users_turn(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no model"):
        compare([tmp_path / "none.onnx"], [FORMULA])


@pytest.mark.parametrize("content", [b"", b"\x00\x01 not protobuf", None], ids=["empty", "noise", "truncated"])
def test_a_file_that_is_no_onnx_is_corrupt(tmp_path: Path, content: bytes | None) -> None:
    whole = convnet(tmp_path / "net.onnx", (16, 16)).path.read_bytes()
    (tmp_path / "bad.onnx").write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(CorruptArtifact) as caught:
        compare([tmp_path / "bad.onnx"], [FORMULA])
    assert "give the path of an ONNX file" in caught.value.next_step


def test_an_unknown_adapter_is_a_profile_error(tmp_path: Path) -> None:
    path = convnet(tmp_path / "a.onnx", (16, 16), 16).path
    with pytest.raises(ProfileError, match="nowhere"):
        compare([path], [Profile(name="x", adapter="nowhere")])
