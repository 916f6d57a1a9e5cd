# cython: language_level=3
"""The ring of sampled tokens between a decode loop and the output thread, and what interrupts the loop.

Both can be used by engines without the GIL (see `_ring.pxd`) and by Python from any thread.
"""

from libc.stdint cimport int32_t, int64_t
from libcpp cimport bool as cbool
from libcpp.vector cimport vector

import math

#: entries of a ring made without a size
DEFAULT_CAPACITY = 65536

# entries handed out by one pop
cdef enum:
    POP_MAX = 4096


cdef class TokenRing:
    """A bounded thread-safe queue of (seq_id, token).

    Args:
        capacity: entries (1 to 2^24); a pusher waits while the ring is full.

    Raises:
        ValueError: capacity out of range.
    """

    def __cinit__(self, capacity=DEFAULT_CAPACITY):
        if not 1 <= capacity <= 1 << 24:
            raise ValueError(f"capacity must be 1 to {1 << 24}, not {capacity}")
        self.queue = new TokenQueue(<size_t>capacity)

    def __dealloc__(self):
        del self.queue

    cdef size_t push_many(self, const int64_t* seq_ids, const int32_t* tokens, size_t n) noexcept nogil:
        return self.queue.push_many(seq_ids, tokens, n)

    def put(self, seq_id, token):
        """Append one entry (int64, int32), waiting with the GIL released while the ring is full.

        Markers of the loop are entries with a token below 0.

        Raises:
            RuntimeError: the ring is closed.
            OverflowError: a number does not fit.
        """
        self.put_many((seq_id,), (token,))

    def put_many(self, seq_ids, tokens):
        """Append one entry for each of two sequences of one length, as `put` does.

        Raises:
            ValueError: their lengths differ.
        """
        cdef vector[int64_t] seqs = seq_ids
        cdef vector[int32_t] toks = tokens
        cdef int pushed
        if seqs.size() != toks.size():
            raise ValueError(f"{seqs.size()} sequences, but {toks.size()} tokens")
        # with the GIL where nothing has to be waited for: whoever lets it go may wait long to get it back
        pushed = self.queue.try_push_many(seqs.data(), toks.data(), seqs.size())
        if pushed == 0:
            with nogil:
                pushed = 1 if self.queue.push_many(seqs.data(), toks.data(), seqs.size()) == seqs.size() else -1
        if pushed < 0:
            raise RuntimeError("the token ring is closed")

    def pop(self, timeout):
        """All entries there are, as (seq_id, token) in push order (at most 4096 at a time).

        Waits up to `timeout` seconds for the first one with the GIL released; [] after the timeout, and at once when
        the ring is closed and empty.

        Raises:
            ValueError: timeout is not a number.
        """
        cdef double seconds = timeout
        cdef TokenEntry entries[POP_MAX]
        cdef size_t n, i
        if math.isnan(seconds):
            raise ValueError("timeout must be a number of seconds")
        seconds = min(seconds, 86400.0)
        with nogil:
            n = self.queue.pop_some(entries, POP_MAX, seconds)
        return [(entries[i].seq_id, entries[i].token) for i in range(n)]

    def close(self):
        """Wake every waiter; later puts fail, pops drain what is left. Idempotent."""
        with nogil:
            self.queue.close()

    @property
    def closed(self):
        """Whether `close` was called."""
        return self.queue.closed()

    @property
    def capacity(self):
        """Entries the ring holds."""
        return self.queue.capacity()

    def __len__(self):
        return self.queue.size()


cdef class Control:
    """What other threads tell an engine's call, and how far it is: steps that have ended are counted."""

    def __cinit__(self):
        self.flag = new ControlFlag()

    def __dealloc__(self):
        del self.flag

    cdef cbool is_set(self) noexcept nogil:
        return self.flag.interrupted()

    def interrupt(self):
        """Make a running decode loop return at its next step boundary; callable from any thread."""
        self.flag.interrupt()

    def abort(self):
        """Interrupt, and let the step under way be given up: nobody wants its results. From any thread."""
        self.flag.abort()

    def clear(self):
        """Take both back: the owner of the loop does it before it calls the engine again."""
        self.flag.clear()

    def step_done(self):
        """Count a step. Decode loops count theirs; the owner of the loop counts those of its other calls."""
        self.flag.step_done()

    @property
    def interrupted(self):
        """Whether a decode loop shall return."""
        return self.flag.interrupted()

    @property
    def aborted(self):
        """Whether the step under way shall be given up."""
        return self.flag.aborted()

    @property
    def n_steps(self):
        """Steps that have ended so far."""
        return self.flag.n_steps()
