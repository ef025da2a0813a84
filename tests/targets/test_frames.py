import io
import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgeprune.targets import _frames
from edgeprune.targets._frames import FrameError, decode, encode

NUMBERS = st.sampled_from(["float32", "float64", "float16", "int64", "int32", "uint8", "bool", "complex64"])


def reading(content: bytes):
    stream = io.BytesIO(content)

    def read(count: int) -> bytes:
        got = stream.read(count)
        if len(got) != count:
            raise EOFError
        return got

    return read


def raw(header: object) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack(">I", len(text)) + text


@settings(max_examples=50, deadline=None)
@given(
    message=st.dictionaries(st.text().filter(lambda name: name != "arrays"), st.integers() | st.text() | st.none()),
    arrays=st.dictionaries(
        st.text(max_size=5), NUMBERS.flatmap(lambda kind: hnp.arrays(kind, hnp.array_shapes(min_dims=0))), max_size=3
    ),
)
def test_what_was_encoded_is_decoded(message, arrays) -> None:
    got, values = decode(reading(b"".join(encode(message, arrays))))
    assert got == message
    assert set(values) == set(arrays)
    for name, value in arrays.items():
        assert values[name].dtype == value.dtype
        np.testing.assert_array_equal(values[name], value)


def test_frames_follow_each_other() -> None:
    read = reading(b"".join([*encode({"n": 1}, {"a": np.arange(3)}), *encode({"n": 2})]))
    assert [decode(read)[0]["n"] for _ in range(2)] == [1, 2]


def test_an_array_with_strides_arrives_in_order() -> None:
    _, values = decode(reading(b"".join(encode({}, {"a": np.arange(12).reshape(3, 4).T[::2]}))))
    np.testing.assert_array_equal(values["a"], np.arange(12).reshape(3, 4).T[::2])


@settings(max_examples=50, deadline=None)
@given(cut=st.integers(0, 200))
def test_a_frame_cut_short_is_never_a_message(cut: int) -> None:
    whole = b"".join(encode({"n": 1}, {"a": np.arange(20)}))
    with pytest.raises(EOFError):
        decode(reading(whole[: min(cut, len(whole) - 1)]))


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=64))
def test_noise_is_never_a_message(noise: bytes) -> None:
    with pytest.raises((EOFError, FrameError)):
        decode(reading(struct.pack(">I", len(noise)) + noise + b"\0"))


@pytest.mark.parametrize(
    "arrays",
    [
        [["a", "|O", [1]]],
        [["a", "<U4", [1]]],
        [["a", "?!", [1]]],
        [["a", "<f4", [-1]]],
        [["a", "<f4", [1.5]]],
        [["a", "<f4"]],
        ["a"],
    ],
    ids=str,
)
def test_an_array_that_is_not_plain_numbers_is_refused(arrays: list) -> None:
    with pytest.raises(FrameError):
        decode(reading(raw({"arrays": arrays}) + bytes(64)))


def test_an_array_beyond_the_cap_is_refused_before_it_is_read() -> None:
    with pytest.raises(FrameError, match="at most"):
        decode(reading(raw({"arrays": [["a", "<f8", [1 << 40]]]})))


def test_a_header_beyond_the_cap_is_refused_before_it_is_read() -> None:
    with pytest.raises(FrameError, match="at most"):
        decode(reading(struct.pack(">I", _frames.HEADER_CAP + 1)))
