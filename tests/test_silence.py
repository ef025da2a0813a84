"""Zeros in place of a layer have the shape the layer would have given."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgeprune.silence import Silence


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 3),
    padding=st.one_of(st.integers(0, 2), st.sampled_from(["same", "valid"])),
    dilation=st.integers(1, 2),
    transposed=st.booleans(),
)
def test_zeros_of_any_convolution_have_its_shape(
    kernel: tuple[int, int], stride: int, padding: int | str, dilation: int, transposed: bool
) -> None:
    """Over kernels, strides, paddings, dilations, and transposed convolutions with output padding."""
    x = torch.randn(2, 3, 11, 9)
    if transposed:
        padding = padding if isinstance(padding, int) else 0
        added = min(stride, dilation * 2) - 1 if stride > 1 else 0
        layer: nn.Module = nn.ConvTranspose2d(3, 5, kernel, stride, padding, added, dilation=dilation)
    else:
        layer = nn.Conv2d(3, 5, kernel, 1 if padding == "same" else stride, padding, dilation)
    silence = Silence(layer, 5)
    assert silence(x).shape == layer(x).shape
    assert not silence(x).any()


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(6, 5), torch.randn(4, 6)),
        (nn.Linear(6, 5), torch.randn(4, 3, 6)),
        (nn.Conv1d(3, 5, 3, 2, 1), torch.randn(2, 3, 10)),
        (nn.Conv3d(3, 5, 3), torch.randn(1, 3, 5, 6, 7)),
    ],
)
def test_other_layers_have_theirs(layer: nn.Module, x: torch.Tensor) -> None:
    """Linear layers of any rank, one and three spatial axes."""
    assert Silence(layer, 5)(x).shape == layer(x).shape


def test_silence_of_no_channels_keeps_type_and_device() -> None:
    """What comes out is like what came in, with nothing to train."""
    silence = Silence(nn.Conv2d(3, 5, 3, padding=1), 0)
    result = silence(torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16))
    assert (result.shape, result.dtype) == ((2, 0, 4, 4), torch.bfloat16)
    assert not silence.state_dict()
    assert repr(silence) == "Silence(channels=0)"
