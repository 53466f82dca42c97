from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh_codec.hevc.geometry import LONGEST_SIDE, SHORTEST_SIDE, Geometry
from mesh_codec.quantiser import Grid


@settings(max_examples=150, deadline=None)
@given(
    channels=st.integers(1, 400),
    tokens=st.integers(1, 3000),
    tile=st.integers(0, 10),
    strips=st.integers(1, 4),
    bits=st.sampled_from([8, 10]),
)
def test_unpacking_gives_back_what_was_packed(channels, tokens, tile, strips, bits):
    geometry = Geometry.of(Grid(channels, tokens), bits=bits, tile=tile, strips=strips)
    pixels = torch.randint(0, 1 << bits, (channels, tokens), dtype=torch.int16)
    planes = geometry.pack(pixels)
    assert planes.shape == (geometry.strips, geometry.frames, 3, geometry.height, geometry.width)
    assert planes.dtype == geometry.dtype
    assert torch.equal(geometry.unpack(planes).to(torch.int16), pixels)


@settings(max_examples=400, deadline=None)
@given(
    channels=st.integers(1, 1 << 14),
    tokens=st.integers(1, 1 << 26),
    tile=st.integers(0, 64),
    strips=st.integers(1, 8),
)
def test_frames_are_of_sizes_that_every_decoder_takes_and_waste_little(channels, tokens, tile, strips):
    geometry = Geometry.of(Grid(channels, tokens), bits=8, tile=tile, strips=strips)
    for side in (geometry.height, geometry.width):
        assert SHORTEST_SIDE <= side <= LONGEST_SIDE and side % 16 == 0
    pixels = geometry.strips * geometry.frames * 3 * geometry.height * geometry.width
    smallest = 3 * (SHORTEST_SIDE + 16) ** 2
    assert pixels <= 4 * channels * tokens + geometry.strips * smallest + 3 * LONGEST_SIDE**2


def test_a_tensor_is_one_frame_of_each_strip_unless_a_tile_is_asked_for():
    grid = Grid(4096, 4096)
    assert Geometry.of(grid, bits=8).frames == 1
    two = Geometry.of(grid, bits=8, strips=2)
    assert (two.strips, two.frames) == (2, 1)
    tiled = Geometry.of(grid, bits=8, tile=8)
    assert (tiled.frames, tiled.height, tiled.width) == (22, 512, 512)


def test_a_small_tensor_has_one_strip():
    assert Geometry.of(Grid(64, 256), bits=8, strips=8).strips == 1
