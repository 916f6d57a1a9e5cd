"""A scheduler on the fake engine, piece by piece, with everything checked that must hold between two of them."""

from __future__ import annotations

from collections import Counter

import numpy as np
from helpers.fake_engine import STOP_ID, FakeEngine

from worker_orcd.engine.protocol import BLOCK_SIZE, EngineConfig
from worker_orcd.engine.sampling import SamplingParams
from worker_orcd.models.plan import KvGroup
from worker_orcd.serving.prefix_cache import Node
from worker_orcd.serving.scheduler import Scheduler
from worker_orcd.serving.work import DecodeWork, LogitsWork, SequenceState, StepWork

FULL = KvGroup(0, (0,))
BOTH = (FULL, KvGroup(48, (1,)))
SLIDING = (KvGroup(48, (0,)),)


def sampling(seed: int = 1) -> SamplingParams:
    return SamplingParams(seed=seed)


def sequence(seq_id: int, n_prompt: int, max_tokens: int = 4, **kw) -> SequenceState:
    prompt = np.array([(seq_id * 7 + i) % 49 + 1 for i in range(n_prompt)], np.int32)
    return SequenceState(seq_id, prompt, max_tokens, sampling() if max_tokens else None, **kw)


class Fixed:
    """A pace: so many prompt tokens in each step."""

    def __init__(self, n: int) -> None:
        self.n = n

    def prompt_tokens(self, n_decode: int, forced: bool = False) -> int:
        return self.n


class Ring:
    def put(self, seq_id, token):
        pass


class Control:
    interrupted = aborted = False

    def step_done(self):
        pass


def make(
    max_seqs=4,
    max_batch_tokens=32,
    context=512,
    n_blocks=(32,),
    groups=(FULL,),
    never_stop=False,
    rope_limits=(),
    prefix_cache=True,
    parts=True,
) -> tuple[Scheduler, FakeEngine]:
    """`parts`: whether the engine copies blocks."""
    config = EngineConfig(max_seqs, max_batch_tokens, context, n_blocks)
    engine = FakeEngine(config, groups, never_stop=never_stop)
    scheduler = Scheduler(
        config,
        groups,
        engine.block_tables,
        [STOP_ID],
        rope_tables=engine.rope_tables,
        rope_limits=rope_limits,
        prefix_cache=prefix_cache,
        copy_block=engine.copy_block if parts else None,
    )
    return scheduler, engine


def admit(scheduler: Scheduler, engine: FakeEngine) -> None:
    """Give slots to those whose turn it is, and tell the engine."""
    for seq in scheduler.admit():
        if seq.sampling is not None:
            engine.set_slot(seq.slot, seq.sampling)
        engine.begins[seq.slot], engine.prompts[seq.slot] = True, seq.prompt


def run(scheduler: Scheduler, engine: FakeEngine, ids: dict[int, list[int]] | None = None):
    """Admit, run one piece of work, return (work, sequences that ended). Tokens go to `ids` by the sequence's id."""
    ids = ids or {}
    admit(scheduler, engine)
    work = scheduler.next_work()
    check_ownership(scheduler)
    check_writes(scheduler, work)
    if isinstance(work, StepWork):
        sampled = engine.step(work.batch, work.want_logits)[0]
        for seq, token in zip(work.outputs, sampled.tolist(), strict=True):
            ids.get(seq.seq_id, []).append(token)
        ended = scheduler.done_step(work, sampled)
    elif isinstance(work, DecodeWork):
        sampled = engine.decode(
            work.slots,
            work.seq_ids,
            work.tokens,
            work.positions,
            work.n_steps,
            work.stop_ids,
            work.stop_offsets,
            Ring(),
            Control(),
        )
        for j, seq in enumerate(work.seqs):
            ids.get(seq.seq_id, []).extend(sampled[:, j].tolist())
        ended = scheduler.done_decode(work, sampled)
    elif isinstance(work, LogitsWork):
        engine.forward(work.batch)
        ended = scheduler.done_logits(work)
    else:
        ended = []
    check_ownership(scheduler)
    check_cache(scheduler, engine)
    return work, ended


def check_ownership(scheduler: Scheduler) -> None:
    """Owners are counted, no block is lost, tables name owned blocks only, what is set aside is there."""
    for i, pool in enumerate(scheduler.pools):
        owned = [b for s in scheduler.running for b in s.blocks[i].values()]
        owners = Counter(owned)
        assert [pool.n_owners(b) for b in range(pool.n_blocks)] == [owners[b] for b in range(pool.n_blocks)]
        assert sorted([*owners, *pool._free, *pool._idle]) == list(range(pool.n_blocks))
        assert all(pool.is_kept(b) for b in pool._idle) and not any(pool.is_kept(b) for b in pool._free)
        reserved = sum(s.reserved[i] for s in scheduler.running)
        unreserved = scheduler._admission.unreserved[i]
        assert 0 <= unreserved <= pool.n_blocks
        if scheduler._blocks._counted_once[i]:
            assert unreserved == pool.n_free - (reserved - len(owned))
            assert all(len(s.blocks[i]) <= s.reserved[i] for s in scheduler.running)
        else:
            assert unreserved == pool.n_blocks - reserved
            borrowed = sum(max(len(s.blocks[i]) - s.reserved[i], 0) for s in scheduler.running)
            assert borrowed <= unreserved, "blocks that are set aside for others"
        table = scheduler._blocks.tables[i]
        assert Counter(table[table >= 0].tolist()) == Counter(owned)
        for seq in scheduler.running:
            assert {n: int(table[seq.slot, n]) for n in np.flatnonzero(table[seq.slot] >= 0)} == seq.blocks[i]


def check_writes(scheduler: Scheduler, work) -> None:
    """A row writes a block that its sequence alone owns, behind what it and the prefix cache have of it."""
    if work is None:
        return
    if isinstance(work, DecodeWork):
        rows = {
            (slot, pos + step)
            for slot, pos in zip(work.slots.tolist(), work.positions.tolist(), strict=True)
            for step in range(work.n_steps)
        }
    else:
        rows = set(zip(work.batch.slots.tolist(), work.batch.positions.tolist(), strict=True))
    n_past = {s.slot: s.n_past for s in scheduler.running}
    cache = scheduler._blocks._cache
    for slot, pos in rows:
        assert pos >= n_past[slot]
        for i, pool in enumerate(scheduler.pools):
            block = int(scheduler._blocks.tables[i, slot, pos // BLOCK_SIZE])
            assert pool.n_owners(block) == 1, "a row writes a block of others"
            if cache is not None and block in cache._holders[i]:
                assert pos % BLOCK_SIZE >= len(cache._holders[i][block].tokens) // 4, "a row writes what is cached"


def check_cache(scheduler: Scheduler, engine: FakeEngine) -> None:
    """The tree, the pools and the sequences agree, and a cached block holds the tokens that the tree says."""
    cache = scheduler._blocks._cache
    if cache is None:
        return
    refs: Counter[Node] = Counter(s.cursor for s in scheduler.running if s.cursor is not None)
    nodes = list(cache._nodes.values())
    refs.update(node.parent for node in nodes)
    roots = set(cache._roots.values())
    for node in [*nodes, *roots]:
        assert node.n_refs == refs[node] and (node in roots or node.n_refs or max(node.blocks) >= 0)
    for i, pool in enumerate(scheduler.pools):
        assert {b: n for n in nodes for b in [n.blocks[i]] if b >= 0} == cache._holders[i]
        assert set(cache._holders[i]) == {b for b in range(pool.n_blocks) if pool.is_kept(b)}
        assert pool.n_kept == len(cache._holders[i])
    alike = [node for same in cache._alike.values() for node in same]
    assert len(alike) == len(set(alike)) and set(alike) <= set(nodes)
    for node in nodes:
        path, at = [], node
        while at.parent is not None:
            assert cache._nodes[at.parent.number, at.tokens] is at
            assert at is node or len(at.tokens) == 4 * BLOCK_SIZE
            path.append(at)
            at = at.parent
        tokens, first = np.frombuffer(node.tokens, np.int32), (len(path) - 1) * BLOCK_SIZE
        for kv, block in zip(engine.kv, node.blocks, strict=True):
            if block >= 0:
                rows = kv[block, : len(tokens)]
                assert rows[:, 0].tolist() == tokens.tolist(), "other tokens than the tree says"
                assert rows[:, 1].tolist() == list(range(first, first + len(tokens)))
                assert (rows[:, 2] == cache_table(at)).all()
    for seq in scheduler.running:
        if seq.cursor is not None:
            at, n = seq.cursor, 0
            while at.parent is not None:
                first = (seq.n_chained - n - 1) * BLOCK_SIZE
                assert at.tokens == seq.written(first, first + BLOCK_SIZE).tobytes()
                at, n = at.parent, n + 1
            assert n == seq.n_chained <= seq.n_past // BLOCK_SIZE and cache_table(at) == seq.rope_table


def cache_table(root: Node) -> int:
    """The frequency table whose sequences start here."""
    return -1 - root.number


def check_empty(scheduler: Scheduler) -> None:
    assert not scheduler.running and scheduler.n_waiting == 0
    assert scheduler.n_free_slots == scheduler.config.max_seqs
    assert [p.n_free for p in scheduler.pools] == list(scheduler.config.n_blocks)
    assert np.all(scheduler._blocks.tables == -1)


def drain(scheduler, engine, limit=10_000):
    ended = []
    for _ in range(limit):
        work, done = run(scheduler, engine)
        ended += done
        if work is None:
            check_empty(scheduler)
            return ended
    raise AssertionError("does not end")


def words(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, 50, n).tolist()


def of(seq_id: int, *parts: list[int], max_tokens: int = 4, **kw) -> SequenceState:
    prompt = np.array([token for part in parts for token in part], np.int32)
    drawn = sampling(kw.pop("seed", 1))
    return SequenceState(seq_id, prompt, max_tokens, drawn if max_tokens else None, **kw)


def finish(scheduler, engine, *seqs: SequenceState) -> list[list[int]]:
    """The ids of sequences that are added together and run to their end."""
    ids: dict[int, list[int]] = {s.seq_id: [] for s in seqs}
    for seq in seqs:
        scheduler.add(seq)
    while any(s.ended is None for s in seqs):
        assert run(scheduler, engine, ids)[0] is not None
    return list(ids.values())


def alone(seq: SequenceState, groups=(FULL,), rope_limits=(), never_stop=True) -> list[int]:
    """The ids of a sequence like `seq` with no cache and nobody beside it."""
    scheduler, engine = make(
        groups=groups,
        n_blocks=(64,) * len(groups),
        context=1024,
        rope_limits=rope_limits,
        prefix_cache=False,
        never_stop=never_stop,
    )
    twin = SequenceState(seq.seq_id, seq.prompt, seq.max_tokens, seq.sampling, seq.stops)
    return finish(scheduler, engine, twin)[0]


def n_computed(engine) -> int:
    """Prompt rows since the last question."""
    n, engine.n_prompt_rows = engine.n_prompt_rows, 0
    return n
