"""The tree of prefixes: what is found, which ends are usable, what goes with an evicted block, and its time."""

from __future__ import annotations

import time

import numpy as np
import pytest

from worker_orcd.engine.kv_blocks import BlockPool
from worker_orcd.engine.protocol import BLOCK_SIZE
from worker_orcd.models.plan import KvGroup
from worker_orcd.serving.prefix_cache import MAX_COMPARED, MIN_PART, Node, PrefixCache

FULL, WINDOW = KvGroup(0, (0,)), KvGroup(100, (1,))


class Tree:
    """A cache over pools, and prompts put into it."""

    def __init__(self, groups=(FULL,), n_blocks=64) -> None:
        self.pools = [BlockPool(n_blocks) for _ in groups]
        self.cache = PrefixCache(groups, self.pools)

    def put(self, prompt: np.ndarray, table: int = 0) -> list[Node]:
        """The nodes of all whole blocks of a prompt and of its end; nobody owns their blocks."""
        nodes, node = [], self.cache.hold(self.cache.root(table))
        for first in range(0, len(prompt), BLOCK_SIZE):
            blocks = [pool.allocate() for pool in self.pools]
            child = self.cache.put(node, prompt[first : first + BLOCK_SIZE], blocks)
            for pool, block in zip(self.pools, blocks, strict=True):
                pool.free(block)
            self.cache.release(node)
            nodes.append(node := child)
        self.cache.release(node)
        return nodes

    def found(self, prompt: np.ndarray, table: int = 0, most: int | None = None) -> list[Node]:
        return self.cache.longest(
            self.cache.root(table), prompt, 0, len(prompt) // BLOCK_SIZE if most is None else most
        )

    def evict(self, group: int, block: int) -> None:
        """Use a block for something else, as if it were the one unused for longest."""
        self.pools[group]._idle.move_to_end(block, last=False)
        taken = []
        while (got := self.pools[group].allocate()) != block:
            taken.append(got)
        for other in taken:
            self.pools[group].free(other)


def prompt(n_blocks: int, seed: int = 1, extra: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 30, n_blocks * BLOCK_SIZE + extra).astype(np.int32)


def test_a_prefix_is_found_block_by_block():
    tree, tokens = Tree(), prompt(5)
    nodes = tree.put(tokens)
    assert tree.found(tokens) == nodes and tree.found(tokens, most=3) == nodes[:3]
    other = tokens.copy()
    other[3 * BLOCK_SIZE] ^= 1
    assert tree.found(other) == nodes[:3]
    assert tree.cache.longest(nodes[1], tokens, 2, 5) == nodes[2:]
    assert tree.found(tokens, table=1) == [], "of another frequency table"
    assert tree.found(tokens[BLOCK_SIZE:]) == [], "the same tokens elsewhere"


def test_the_same_prompt_again_brings_no_other_block():
    tree, tokens = Tree(), prompt(3)
    nodes = tree.put(tokens)
    blocks = [list(node.blocks) for node in nodes]
    assert tree.put(tokens) == nodes and [list(node.blocks) for node in nodes] == blocks
    assert tree.pools[0].n_kept == 3


@pytest.mark.parametrize("gone", range(6))
def test_a_prefix_ends_before_a_block_of_a_full_group_that_is_gone(gone):
    tree, tokens = Tree((FULL, WINDOW)), prompt(6)
    nodes = tree.put(tokens)
    tree.evict(0, nodes[gone].blocks[0])
    assert tree.found(tokens) == nodes[:gone]


@pytest.mark.parametrize("gone", range(6))
def test_a_windowed_block_that_is_gone_matters_where_it_would_be_read(gone):
    """A query at position p reads from p - 99 on."""
    tree, tokens = Tree((FULL, WINDOW)), prompt(6)
    nodes = tree.put(tokens)
    tree.evict(1, nodes[gone].blocks[1])
    for end in range(1, 7):
        usable = [e for e in range(end + 1) if not max(e * BLOCK_SIZE - 99, 0) // BLOCK_SIZE <= gone < e]
        assert len(tree.found(tokens, most=end)) == max(usable), end


def test_a_node_goes_with_its_last_block_and_its_last_child():
    tree, tokens = Tree((FULL, WINDOW)), prompt(3)
    nodes = tree.put(tokens)
    for node in nodes[:2]:
        for group in (0, 1):
            tree.evict(group, node.blocks[group])
    assert len(tree.cache._nodes) == 3, "children hold their parents"
    tree.evict(0, nodes[2].blocks[0])
    tree.evict(1, nodes[2].blocks[1])
    assert not tree.cache._nodes and not tree.cache._alike and tree.cache.root(0).n_refs == 0
    assert tree.cache.n_evicted == 6


def test_a_node_that_is_held_stays_where_it_is():
    tree, tokens = Tree(), prompt(2)
    nodes = tree.put(tokens)
    tree.cache.hold(nodes[1])
    for node in nodes:
        tree.evict(0, node.blocks[0])
    assert tree.found(tokens) == []
    block = tree.pools[0].allocate()
    tree.cache.release(tree.cache.put(nodes[1], prompt(1, 5), [block]))
    tree.cache.release(nodes[1])
    assert len(tree.cache._nodes) == 3
    tree.pools[0].free(block)
    tree.evict(0, block)
    assert not tree.cache._nodes


def test_the_child_that_begins_alike():
    tree, tokens = Tree(), prompt(1)
    root = tree.cache.root(0)
    assert tree.cache.alike(root, tokens[:63]) is None
    tree.put(np.append(tokens[:30], prompt(1, 2)[:34]))
    assert tree.cache.alike(root, tokens[:63])[1] == 30
    assert tree.cache.alike(root, tokens[:20])[1] == 20
    assert tree.cache.alike(root, tokens[: MIN_PART - 1]) is None
    (best,) = tree.put(tokens[:50])
    assert tree.cache.alike(root, tokens[:63]) == (best, 50)
    other = tokens.copy()
    other[MIN_PART - 1] ^= 1
    assert tree.cache.alike(root, other[:63]) is None
    for i in range(MAX_COMPARED):  # the newest are compared, and no more of them
        tree.put(np.append(tokens[:20], prompt(1, 10 + i)[:44]))
    assert tree.cache.alike(root, tokens[:63])[1] == 20


def test_a_block_to_which_more_was_written_is_of_the_longer_node():
    """Of each group the one that has it; a node that is left without any is gone, and so the block is kept once."""
    tree, tokens = Tree((FULL, WINDOW)), prompt(1)
    root, (a, b) = tree.cache.root(0), (pool.allocate() for pool in tree.pools)
    short = tree.cache.put(root, tokens[:20], [a, b])
    tree.cache.release(short)
    longer = tree.cache.put(root, tokens[:40], [a, -1])
    assert (short.blocks, longer.blocks) == ([-1, b], [a, -1]) and tree.cache.alike(root, tokens[:63]) is None
    whole = tree.cache.put(root, tokens, [a, b])
    assert whole.blocks == [a, b] and longer.blocks == [-1, -1] and [p.n_kept for p in tree.pools] == [1, 1]
    assert tree.cache.alike(root, tokens[:63]) == (whole, 63) and tree.found(tokens) == [whole]
    for node in (longer, whole):
        tree.cache.release(node)
    assert list(tree.cache._nodes.values()) == [whole] and root.n_refs == 1
    for group, block in ((0, a), (1, b)):
        tree.pools[group].free(block)
        tree.evict(group, block)
    assert not tree.cache._nodes and not tree.cache._alike and root.n_refs == 0


def test_a_block_is_left_with_the_shorter_node_where_the_longer_has_another():
    tree, tokens = Tree(), prompt(1)
    root, a, b = tree.cache.root(0), tree.pools[0].allocate(), tree.pools[0].allocate()
    whole, short = tree.cache.put(root, tokens, [a]), tree.cache.put(root, tokens[:20], [b])
    assert tree.cache.put(root, tokens, [b]) is whole and (whole.blocks, short.blocks) == ([a], [b])
    tree.cache.clear()
    assert tree.pools[0].n_kept == 0


def test_what_a_sequence_used_is_taken_out_with_all_that_leads_there():
    tree, tokens = Tree((FULL, WINDOW)), prompt(4)
    nodes = tree.put(tokens)
    side = tree.put(np.append(tokens[: 2 * BLOCK_SIZE], prompt(1, 9)))[-1]
    owned = nodes[3].blocks[0]
    tree.pools[0].share(owned)
    tree.cache.forget_path(tree.cache.root(0), [{3: owned}, {}])
    assert tree.found(tokens) == [] and tree.pools[0].n_kept == 1 == tree.pools[1].n_kept
    assert max(side.blocks) >= 0, "what branched off is unreachable until its start is there again"
    tree.pools[0].free(owned)
    assert tree.pools[0].n_free == 64
    again = tree.put(tokens)
    assert tree.found(tokens) == again and tree.found(np.append(tokens[: 2 * BLOCK_SIZE], prompt(1, 9)))[-1] is side
    tree.cache.forget_path(side, [{}, {}])
    assert tree.found(tokens) == [] and max(side.blocks) < 0, "what it has passed, and owns no more"


def test_an_emptied_cache_is_as_new():
    tree, tokens = Tree((FULL, WINDOW)), prompt(4, extra=20)
    nodes = tree.put(tokens)
    held = tree.cache.hold(nodes[1])
    tree.cache.clear()
    assert tree.found(tokens) == [] and all(p.n_kept == 0 and p.n_free == 64 for p in tree.pools)
    tree.cache.release(held)
    assert tree.found(tokens) == [] != tree.put(tokens)
    assert len(tree.found(tokens)) == 4


def test_a_prompt_of_2048_blocks_is_put_and_found_within_milliseconds():
    """Microseconds a block; the limit is wide, for a busy machine."""
    tree, tokens = Tree(n_blocks=2048), prompt(2048)
    began = time.perf_counter()
    tree.put(tokens)
    put = time.perf_counter() - began
    best = 1.0
    for _ in range(5):
        began = time.perf_counter()
        assert len(tree.found(tokens)) == 2048
        best = min(best, time.perf_counter() - began)
    print(f"2,048 blocks: put {put * 1e3:.1f} ms, found {best * 1e3:.1f} ms")
    assert best < 0.05 and put < 0.5
