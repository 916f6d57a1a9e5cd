"""How the prompt rows of a step are cut into attention tiles, against the rule written out row by row."""

from __future__ import annotations

import numpy as np
import pytest

from worker_orcd._engine import _tiles


def by_the_rule(positions, slots, n_decode):
    """Up to 64 consecutive rows of one sequence that end at a multiple of 64 positions or at the chunk's end."""
    tiles, row = [], n_decode
    while row < len(positions):
        end = row + 1
        while (
            end < len(positions)
            and slots[end] == slots[row]
            and positions[end] == positions[end - 1] + 1
            and positions[end] % 64
        ):
            end += 1
        tiles.append((row, end - row, positions[row], slots[row]))
        row = end
    return sorted(tiles, key=lambda tile: -(tile[2] + tile[1]))


@pytest.mark.parametrize("seed", range(40))
def test_tiles_are_those_of_the_rule(seed):
    rng = np.random.default_rng(seed)
    n_decode = int(rng.integers(0, 5))
    chunks = [(slot, int(rng.integers(0, 300)), int(rng.integers(1, 200))) for slot in rng.permutation(8)[: seed % 5]]
    positions = np.concatenate([rng.integers(0, 900, n_decode), *(np.arange(p, p + n) for _, p, n in chunks)])
    slots = np.concatenate([np.arange(8, 8 + n_decode), *(np.full(n, slot) for slot, _, n in chunks)])
    positions, slots = positions.astype(np.int32), slots.astype(np.int32)
    tiles = _tiles(positions, slots, n_decode)
    assert tiles.dtype == np.int32 and tiles.shape[1] == 4
    assert tiles.tolist() == [list(map(int, tile)) for tile in by_the_rule(positions, slots, n_decode)]
