"""The block pool: counts of owners, the order of reuse, what it refuses; and the bytes of blocks."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker_orcd.engine import kv_blocks
from worker_orcd.engine.kv_blocks import BlockPool
from worker_orcd.engine.protocol import BLOCK_SIZE
from worker_orcd.errors import InternalError
from worker_orcd.models.plan import KvGroup, Plan

ACTIONS = st.lists(st.tuples(st.sampled_from(["allocate", "share", "free"]), st.integers(0, 1 << 16)), max_size=80)


@settings(max_examples=300)
@given(st.integers(1, 6), ACTIONS)
def test_no_block_in_use_is_handed_out_whatever_is_shared_and_freed(n_blocks, actions):
    """Any order of allocate, share and free against a count of owners and a stack of free blocks."""
    pool, owners, stack = BlockPool(n_blocks), Counter(), list(range(n_blocks))[::-1]
    for action, pick in actions:
        block = pick % n_blocks
        if action == "allocate" and stack:
            got = pool.allocate()
            assert owners[got] == 0 and got == stack.pop()
            owners[got] = 1
        elif action == "allocate":
            with pytest.raises(InternalError, match="in use"):
                pool.allocate()
        elif owners[block] == 0:
            with pytest.raises(InternalError, match=f"KV block {block} is "):
                getattr(pool, action)(block)
        elif action == "share":
            pool.share(block)
            owners[block] += 1
        else:
            pool.free(block)
            owners[block] -= 1
            if not owners[block]:
                stack.append(block)
        assert [pool.n_owners(b) for b in range(n_blocks)] == [owners[b] for b in range(n_blocks)]
        assert pool.n_free == len(stack) == sum(owners[b] == 0 for b in range(n_blocks))


def test_the_block_freed_last_is_used_first():
    pool = BlockPool(4)
    assert [pool.allocate() for _ in range(3)] == [0, 1, 2]
    pool.free(0)
    pool.free(2)
    assert [pool.allocate() for _ in range(3)] == [2, 0, 3]


def test_a_shared_block_is_free_when_its_last_owner_frees_it():
    pool = BlockPool(1)
    block = pool.allocate()
    pool.share(block)
    pool.free(block)
    assert pool.n_free == 0 and pool.n_owners(block) == 1
    pool.free(block)
    assert pool.n_free == 1 and pool.n_owners(block) == 0
    with pytest.raises(InternalError, match="freed twice"):
        pool.free(block)


@pytest.mark.parametrize("block", [-1, 2, 1 << 40])
@pytest.mark.parametrize("verb", ["share", "free", "n_owners", "keep", "forget"])
def test_a_block_of_no_pool_is_refused(block, verb):
    pool = BlockPool(2)
    pool.allocate()
    pool.allocate()
    with pytest.raises(InternalError, match=f"KV block {block} is not one of the 2"):
        getattr(pool, verb)(block)


def test_how_many_sequences_the_pools_hold():
    full, sliding = KvGroup(0, (0,)), KvGroup(24, (1,))
    assert kv_blocks.sequences_held((full,), (33,), 2112) == 1 and kv_blocks.sequences_held((full,), (32,), 2112) == 0
    assert kv_blocks.sequences_held((full, sliding), (330, 6), 2112) == 6 // kv_blocks.window_blocks(24)
    assert kv_blocks.positions_held((full, sliding), (33, 1)) == 33 * BLOCK_SIZE
    assert kv_blocks.positions_held((sliding,), (5,)) is None


@pytest.mark.parametrize("extra", [0, 1, 30, 100, 1000])
def test_a_long_context_leaves_windowed_layers_what_many_sequences_need(extra):
    """One sequence of the whole context fits, and the rest is for the group that has fewer."""
    groups = (KvGroup(0, (0,)), KvGroup(128, (1,)))
    plan = Plan("x", 10, 8, 2, 2, 32, 131_072, None, {}, {}, (), groups, (0, 1))
    size, (full, sliding) = kv_blocks.block_bytes(plan)[0], (2048, 4)
    blocks = kv_blocks.blocks_within(plan, (full + sliding + extra) * size, 32, 256, 131_072)
    assert sum(blocks) == full + sliding + extra and blocks[0] >= full
    assert blocks[1] == min(sliding + extra, 32 * sliding + 256 // 64)


def test_bytes_of_blocks_are_those_of_their_layers():
    """float16 K and V: 64 positions of 2 KV heads of 32 take 16 KiB a layer."""
    plan = Plan("x", 10, 8, 3, 2, 32, 1024, None, {}, {}, (), (KvGroup(0, (0, 2)), KvGroup(24, (1,))), (0, 1, 0))
    assert kv_blocks.layer_block_bytes(plan) == 16384
    assert kv_blocks.block_bytes(plan) == (32768, 16384)
    assert kv_blocks.position_bytes(plan) * BLOCK_SIZE == 16384


KEEPING = st.lists(
    st.tuples(st.sampled_from(["allocate", "share", "free", "keep", "forget", "touch"]), st.integers(0, 1 << 16)),
    max_size=80,
)


@settings(max_examples=300)
@given(st.integers(1, 6), KEEPING)
def test_a_kept_block_waits_with_its_content_until_no_other_is_free(n_blocks, actions):
    """Against a list of kept blocks in the order of their last use: truly free ones first, then its front."""
    pool, owners, kept, idle, evicted = BlockPool(n_blocks), Counter(), set(), [], []
    pool.on_evict = evicted.append
    for action, pick in actions:
        block = pick % n_blocks
        owned, waits = owners[block] > 0, block in idle
        if action == "allocate":
            plain = [b for b in range(n_blocks) if not owners[b] and b not in idle]
            if not plain and not idle:
                with pytest.raises(InternalError, match="in use"):
                    pool.allocate()
                continue
            got = pool.allocate()
            if plain:
                assert got in plain and not evicted
            else:
                assert [got] == [idle.pop(0)] == evicted
                kept.remove(got)
                evicted.clear()
            owners[got] = 1
        elif action == "share" and (owned or waits):
            pool.share(block)
            owners[block] += 1
            idle = [b for b in idle if b != block]
        elif action == "free" and owned:
            pool.free(block)
            owners[block] -= 1
            if not owners[block] and block in kept:
                idle.append(block)
        elif action == "keep" and owned and block not in kept:
            pool.keep(block)
            kept.add(block)
        elif action == "forget" and block in kept:
            pool.forget(block)
            kept.remove(block)
            idle = [b for b in idle if b != block]
        elif action == "touch":
            pool.touch(block)
            if waits:
                idle.append(idle.pop(idle.index(block)))
        else:
            with pytest.raises(InternalError, match=f"KV block {block} is "):
                getattr(pool, action)(block)
        assert [pool.is_kept(b) for b in range(n_blocks)] == [b in kept for b in range(n_blocks)]
        assert pool.n_kept == len(kept) and pool.n_free == sum(owners[b] == 0 for b in range(n_blocks))
