"""The prefix cache: which KV blocks hold the beginning of which text, prompts and what was generated behind them.

A tree. Its roots are the plan's rotary frequency tables, a node is `BLOCK_SIZE` tokens of a text after those of its
parent, and names the block of each KV group that holds them. The end of a text that fills no block is a node of fewer
tokens, a leaf; its block is not shared but copied.

A node is found by its parent and its tokens themselves, not by a digest of them: two prefixes are never mistaken for
each other. The tokens of a node are those whose KV was written, whether their text was shown or not. Which rows wrote
it does not count: an engine leaves the same bits for a token of a prompt and for one that it has drawn. The block pools
decide how long a block stays (`BlockPool.keep`), and say so when one is used for something else.

This is bookkeeping only, of block numbers. One thread uses it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

import numpy as np

from worker_orcd.engine.kv_blocks import BlockPool, first_kept
from worker_orcd.engine.protocol import BLOCK_SIZE
from worker_orcd.models.plan import KvGroup

#: fewest tokens at the start of a block for which it is copied: computing fewer costs about as much
MIN_PART = 8
#: nodes that are compared to find the one with the longest common start
MAX_COMPARED = 8


class Node:
    """The tokens of one block after those of `parent`.

    Attributes:
        number: of this node, never used twice; below 0: a root.
        parent: None for a root.
        tokens: int32 bytes.
        blocks: for each KV group the block that holds them, -1 where none does.
        n_refs: child nodes, and sequences that hold it (`PrefixCache.hold`). A node without blocks is gone with these.
    """

    __slots__ = ("blocks", "n_refs", "number", "parent", "tokens")

    def __init__(self, number: int, parent: Node | None, tokens: bytes, n_groups: int) -> None:
        self.number, self.parent, self.tokens = number, parent, tokens
        self.blocks = [-1] * n_groups
        self.n_refs = 0


class PrefixCache:
    """The tree over the pools of all KV groups.

    Args:
        groups: the plan's KV groups.
        pools: of each; their `on_evict` is set.
    """

    def __init__(self, groups: Sequence[KvGroup], pools: Sequence[BlockPool]) -> None:
        self._full = [i for i, group in enumerate(groups) if not group.window]
        self._windowed = [(i, group) for i, group in enumerate(groups) if group.window]
        self._pools = pools
        self._roots: dict[int, Node] = {}
        self._nodes: dict[tuple[int, bytes], Node] = {}  # by the parent's number and the tokens
        self._alike: dict[tuple[int, bytes], dict[Node, None]] = {}  # by the parent's number and the first MIN_PART
        self._holders: list[dict[int, Node]] = [{} for _ in groups]  # by block
        self._numbers = itertools.count()
        #: blocks that were used for something else
        self.n_evicted = 0
        for i, pool in enumerate(pools):
            pool.on_evict = partial(self._evicted, i)

    def root(self, rope_table: int) -> Node:
        """The start of every sequence that turns by a frequency table."""
        if rope_table not in self._roots:
            self._roots[rope_table] = Node(-1 - rope_table, None, b"", len(self._pools))
        return self._roots[rope_table]

    def hold(self, node: Node) -> Node:
        """Let a node stay where it is, with or without blocks, until `release`. Returns it."""
        node.n_refs += 1
        return node

    def release(self, node: Node) -> None:
        """Undo one `hold`."""
        node.n_refs -= 1
        self._tidy(node)

    # -- reading

    def longest(self, node: Node, prompt: np.ndarray, start: int, most: int) -> list[Node]:
        """The nodes of the longest usable prefix after `node`.

        Usable is what ends where a sequence can go on: every group without a window has all blocks up to there, and
        every other group those that a query there or later may still read.

        Args:
            node: of the block before `start`; who asks has all blocks up to there that it may still read.
            prompt: int32 [n_prompt].
            start, most: numbers of blocks: the first that is wanted, and the one that is wanted no more.
        """
        found: list[Node] = []
        n_usable = 0
        first = [0] * len(self._windowed)  # of each windowed group: from this block on all are there
        data = np.ascontiguousarray(prompt[start * BLOCK_SIZE : most * BLOCK_SIZE], np.int32).data.cast("B")
        size = 4 * BLOCK_SIZE
        for number in range(start, most):
            at = (number - start) * size
            child = self._nodes.get((node.number, data[at : at + size].tobytes()))
            if child is None or any(child.blocks[i] < 0 for i in self._full):
                break
            node = child
            found.append(node)
            usable = True
            for k, (i, group) in enumerate(self._windowed):
                if node.blocks[i] < 0:
                    first[k] = number + 1
                usable = usable and first[k] <= first_kept(group, (number + 1) * BLOCK_SIZE)
            if usable:
                n_usable = len(found)
        return found[:n_usable]

    def alike(self, node: Node, tokens: np.ndarray) -> tuple[Node, int] | None:
        """The child that begins with most of `tokens`, and with how many; None: none with `MIN_PART` or more.

        Args:
            node: who asks has all blocks up to its end that it may still read.
            tokens: int32 [n], n < BLOCK_SIZE.
        """
        best = None
        children = self._alike.get((node.number, tokens[:MIN_PART].tobytes()), {})
        for child in itertools.islice(reversed(children), MAX_COMPARED):
            if min(child.blocks) >= 0:
                n = n_common(np.frombuffer(child.tokens, np.int32), tokens)
                if best is None or n > best[1]:
                    best = child, n
        return best

    # -- writing

    def put(self, parent: Node, tokens: np.ndarray, blocks: Sequence[int]) -> Node:
        """The node of `tokens` after `parent`, with `blocks` (owned; -1: none) where it had none. It is held.

        A group of which it has another block already keeps that one: it holds the same. A block of a leaf, to which
        more tokens were written since, is this node's then: what the leaf said of it, this one says too.
        """
        key = tokens.tobytes()
        node = self._nodes.get((parent.number, key))
        if node is None:
            node = Node(next(self._numbers), self.hold(parent), key, len(self._pools))
            self._nodes[parent.number, key] = node
            if len(tokens) >= MIN_PART:
                self._alike.setdefault((parent.number, key[: 4 * MIN_PART]), {})[node] = None
        for i, block in enumerate(blocks):
            if node.blocks[i] < 0 <= block:
                leaf = self._holders[i].get(block)
                node.blocks[i], self._holders[i][block] = block, node
                if leaf is None:
                    self._pools[i].keep(block)
                else:
                    leaf.blocks[i] = -1
                    self._tidy(leaf)
        return self.hold(node)

    def forget_path(self, cursor: Node, owned: Sequence[dict[int, int]]) -> None:
        """Take out what a sequence with these blocks, which has come as far as `cursor`, may have put in, and all that
        leads there."""
        ends: list[Node | None] = [cursor]
        for holders, blocks in zip(self._holders, owned, strict=True):
            ends += map(holders.get, blocks.values())
        path: dict[Node, None] = {}
        for node in ends:
            while node is not None and node not in path:
                path[node] = None
                node = node.parent
        for node in path:
            self._take_blocks(node)
        for node in path:
            self._tidy(node)

    def clear(self) -> None:
        """Forget everything. Nodes that are held must be released; they lead nowhere any more."""
        for pool, holders in zip(self._pools, self._holders, strict=True):
            for block in holders:
                pool.forget(block)
            holders.clear()
        self._nodes.clear()
        self._alike.clear()
        self._roots.clear()

    # -- inside

    def _evicted(self, group: int, block: int) -> None:
        self.n_evicted += 1
        node = self._holders[group].pop(block)
        node.blocks[group] = -1
        self._tidy(node)

    def _take_blocks(self, node: Node) -> None:
        for i, block in enumerate(node.blocks):
            if block >= 0:
                del self._holders[i][block]
                self._pools[i].forget(block)
                node.blocks[i] = -1

    def _tidy(self, node: Node) -> None:
        """Take a node that is of no use any more out of the tree, and its parents if that makes them so."""
        while node.parent is not None and not node.n_refs and max(node.blocks) < 0:
            parent, key = node.parent, (node.parent.number, node.tokens)
            if self._nodes.get(key) is not node:
                return
            del self._nodes[key]
            head = parent.number, node.tokens[: 4 * MIN_PART]
            if node in self._alike.get(head, ()):
                del self._alike[head][node]
                if not self._alike[head]:
                    del self._alike[head]
            parent.n_refs -= 1
            node = parent


def n_common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two arrays have in common at their start."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
