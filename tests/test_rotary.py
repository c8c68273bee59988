"""Position re-encoding against complex numbers, and against the model's own encoding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_blockcache.rotary import Angles, pairs, rotate_keys, unrotate_keys


def angles_at(positions, rotary_dim, stretch=1.0):
    frequencies = 100.0 ** -(torch.arange(rotary_dim // 2) / (rotary_dim // 2))
    turns = torch.as_tensor(positions)[:, None] * frequencies
    return Angles(turns.cos() * stretch, turns.sin() * stretch)


def turned_as_complex_numbers(keys, positions, rotary_dim, interleaved):
    """Reach the same another way: each pair of dimensions is a complex number, turned by multiplication."""
    frequencies = 100.0 ** -(torch.arange(rotary_dim // 2) / (rotary_dim // 2))
    turn = torch.polar(torch.ones(()), torch.as_tensor(positions)[:, None] * frequencies)
    turned = keys.clone()
    first, second = (
        (slice(0, rotary_dim, 2), slice(1, rotary_dim, 2))
        if interleaved
        else (slice(0, rotary_dim // 2), slice(rotary_dim // 2, rotary_dim))
    )
    numbers = torch.complex(keys[..., first], keys[..., second]) * turn
    turned[..., first], turned[..., second] = numbers.real, numbers.imag
    return turned


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [4, 16])
def test_keys_turn_as_complex_numbers_do(interleaved, rotary_dim):
    keys, positions = torch.randn(2, 3, 5, 16), [0, 1, 7, 100, 3]
    turned = rotate_keys(keys, angles_at(positions, rotary_dim), interleaved=interleaved)
    torch.testing.assert_close(turned, turned_as_complex_numbers(keys, positions, rotary_dim, interleaved))
    assert torch.equal(turned[..., rotary_dim:], keys[..., rotary_dim:])


@settings(max_examples=30, deadline=None)
@given(
    positions=st.lists(st.integers(0, 5000), min_size=1, max_size=5),
    interleaved=st.booleans(),
    stretch=st.floats(0.5, 2.0),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_turning_back_undoes_turning_and_stretching(positions, interleaved, stretch, dtype):
    keys = torch.randn(2, len(positions), 8).to(dtype)
    angles = angles_at(positions, 8, stretch)
    back = unrotate_keys(
        rotate_keys(keys.float(), angles, interleaved=interleaved), angles, interleaved=interleaved
    )
    torch.testing.assert_close(back.to(dtype), keys, rtol=1e-4 if dtype == torch.float32 else 0.02, atol=1e-4)


def test_angles_rounded_by_a_model_are_undone_exactly():
    angles = angles_at([5, 600], 8)
    rounded = Angles(angles.cos.bfloat16().float(), angles.sin.bfloat16().float())
    keys = torch.randn(1, 2, 8)
    torch.testing.assert_close(unrotate_keys(rotate_keys(keys, rounded), rounded), keys)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_turn_is_computed_in_float32_and_rounded_once(dtype):
    keys = torch.randn(4, 6, 16).to(dtype)
    angles = angles_at(range(6), 16)
    turned = rotate_keys(keys, angles)
    assert turned.dtype == dtype
    assert torch.equal(turned, rotate_keys(keys.float(), angles).to(dtype))


def test_nothing_is_written_but_out():
    keys = torch.randn(2, 3, 8)
    before, out = keys.clone(), torch.zeros(2, 5, 8)
    result = rotate_keys(keys, angles_at([1, 2, 3], 4), out=out[:, 1:4])
    assert torch.equal(keys, before)
    assert torch.equal(out[:, 1:4], result)
    assert not out[:, [0, 4]].any()


def test_angles_of_a_stretch_of_positions_are_views():
    angles = angles_at(range(10), 8)
    part = angles.at(3, 5)
    assert torch.equal(part.cos, angles.cos[3:5])
    assert part.sin.data_ptr() == angles.sin[3:].data_ptr()
    assert angles.to(torch.device("cpu")).cos.device.type == "cpu"


def test_pairs_are_views_of_the_dimensions_that_carry_a_position():
    keys = torch.arange(8)
    assert [half.tolist() for half in pairs(keys, 6, interleaved=False)] == [[0, 1, 2], [3, 4, 5]]
    assert [half.tolist() for half in pairs(keys, 6, interleaved=True)] == [[0, 2, 4], [1, 3, 5]]
