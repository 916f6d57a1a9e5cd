# distutils: language = c++
# cython: language_level=3
"""The way of tokens to text and to clients without Python: sinks of jobs, bodies of streams, the output thread's loop.

The work is done in csrc/host (output_loop.h, job_sink.h, client_stream.h); this file checks the arguments, owns the
objects, and lets other Python threads run meanwhile. All objects may be used from any thread.
"""

from cpython.exc cimport PyErr_SetFromErrno
from libc.stdint cimport int32_t, int64_t
from libcpp cimport bool as cbool
from libcpp.memory cimport make_shared, shared_ptr, unique_ptr
from libcpp.string cimport string
from libcpp.utility cimport move, pair
from libcpp.vector cimport vector

from worker_orcd._ring cimport TokenQueue, TokenRing
from worker_orcd._text cimport CTextDecoder, TextDecoder

cdef extern from "<sys/epoll.h>" nogil:
    const int EPOLL_CTL_ADD, EPOLL_CTL_DEL

cdef extern from "host/client_stream.h" namespace "worker_orcd" nogil:
    int change_watch(int epoll, int op, int fd)
    cdef cppclass CClientStream "worker_orcd::ClientStream":
        CClientStream(int fd, cbool chunked, int epoll, int wake, size_t limit) except +
        int begin(const char* head, size_t n_head, const char* data, size_t n) except +
        int write(const char* data, size_t n) except +
        int finish(const char* data, size_t n) except +
        int flush() except +
        int writable() except +
        void release() except +
        cbool overflowed() except +
        cbool lost() except +
        double silent_seconds() except +

cdef extern from "host/piece_template.h" namespace "worker_orcd" nogil:
    cdef cppclass CPieceTemplate "worker_orcd::PieceTemplate":
        CPieceTemplate() except +
        string before, after, end
        cbool counts
        void encode(const char* text, size_t n, size_t index, string& out) except +

cdef extern from "host/job_sink.h" namespace "worker_orcd" nogil:
    cdef struct TakenPiece:
        string text
        vector[int32_t] token_ids
        size_t index

    cdef cppclass CJobSink "worker_orcd::JobSink":
        CJobSink() except +
        void decode_with(unique_ptr[CTextDecoder] decoder, vector[string] stops, vector[int32_t] stop_ids,
                         size_t n_unwatched) except +
        cbool decodes() except +
        cbool add_piece(const string& text, const vector[int32_t]& token_ids) except +
        void add_silent(const vector[int32_t]& token_ids) except +
        void close() except +
        cbool take(TakenPiece& piece) except +
        cbool ready() except +
        void attach(shared_ptr[CClientStream] stream, const CPieceTemplate& form) except +
        pair[string, int32_t] ended_by() except +
        string text() except +
        vector[int32_t] token_ids() except +
        size_t n_tokens() except +

cdef extern from "host/output_loop.h" namespace "worker_orcd" nogil:
    cdef struct Report:
        int64_t seq_id
        int32_t kind
        int32_t value

    cdef cppclass COutputLoop "worker_orcd::OutputLoop":
        COutputLoop(int32_t failed) except +
        void add(int64_t seq_id, shared_ptr[CJobSink] sink) except +
        void remove(int64_t seq_id) except +
        void run(TokenQueue& queue, double timeout_s, vector[Report]& reports) except +

#: states of a `ClientStream`: more may come, the system has all of it, the client has gone
OPEN, SENT, GONE = range(3)
#: kinds of reports of an `OutputLoop`; see its `run`
WOKEN, TOKEN, MARK, STOPPED, PIECE = range(5)


# with the GIL: each takes a microsecond, and getting the GIL back may take a thousand

def watch(int epoll, int fd):
    """Let an epoll instance tell of the other side of `fd` closing. Raises: OSError."""
    if change_watch(epoll, EPOLL_CTL_ADD, fd) < 0:
        PyErr_SetFromErrno(OSError)


def unwatch(int epoll, int fd):
    """Let it tell nothing of `fd` any more. Raises: OSError."""
    if change_watch(epoll, EPOLL_CTL_DEL, fd) < 0:
        PyErr_SetFromErrno(OSError)


cdef class ClientStream:
    """The body of one HTTP answer on its way. What the socket does not take at once waits here; nothing blocks.

    Args:
        fd: the client's socket, which must stay open until `release`.
        chunked: frame the body by HTTP/1.1's chunks; else its bytes go as they are, and closing ends it.
        epoll: an epoll instance that watches `fd` for EPOLLRDHUP; it watches for EPOLLOUT too while something waits.
            Then call `writable`.
        wake: an eventfd that is told once when more than `limit` bytes wait; pieces are dropped from then on.
    """

    cdef shared_ptr[CClientStream] stream

    def __init__(self, int fd, bint chunked, int epoll, int wake, size_t limit):
        self.stream = make_shared[CClientStream](fd, <cbool>chunked, epoll, wake, limit)

    # a few bytes are sent with the GIL: the system takes microseconds for them, and whoever lets the GIL go while other
    # threads wait for it may wait for milliseconds to get it back

    def begin(self, bytes head not None, bytes data not None):
        """Send the head of the answer, as it is, and the first bytes of the body with it. Returns the state: OPEN, SENT
        or GONE, as the next ones do."""
        return self.stream.get().begin(head, len(head), data, len(data))

    def write(self, bytes data not None):
        """Append bytes, however much waits, and send."""
        return self.stream.get().write(data, len(data))

    def finish(self, bytes data not None=b""):
        """Append the last bytes of the body, end it, and send."""
        return self.stream.get().finish(data, len(data))

    def writable(self):
        """The socket can be written again: send what waits."""
        cdef int state
        with nogil:
            state = self.stream.get().writable()
        return state

    def release(self):
        """Leave the socket alone from now on."""
        self.stream.get().release()

    @property
    def overflowed(self):
        """Whether more waited than may."""
        return self.stream.get().overflowed()

    @property
    def lost(self):
        """Whether a piece was dropped because of that."""
        return self.stream.get().lost()

    @property
    def silent_seconds(self):
        """Seconds since the system took the last byte; 0 while some wait for the client."""
        return self.stream.get().silent_seconds()


cdef CPieceTemplate _template(bytes before, bytes after, bytes end) except *:
    cdef CPieceTemplate form
    form.before = before
    form.after = after
    form.counts = end is not None
    if end is not None:
        form.end = end
    return form


def encode_piece(bytes before not None, bytes after not None, bytes end, str text not None, size_t index):
    """One piece by a template (see `wsgi.stream_format.PieceTemplate`), as streams get it."""
    cdef CPieceTemplate form = _template(before, after, end)
    cdef bytes data = text.encode("utf-8")
    cdef string out
    form.encode(data, len(data), index, out)
    return <bytes>out


cdef class JobSink:
    """Where the tokens of one job become its text, and its pieces wait for who takes them - or are sent to a client.

    It is fed by an `OutputLoop` after `decode_with`, else by `add_piece`.
    """

    cdef shared_ptr[CJobSink] sink

    def __cinit__(self):
        self.sink = make_shared[CJobSink]()

    def decode_with(self, TextDecoder decoder, stops, stop_ids, size_t n_unwatched=0):
        """Make pieces of the tokens that the loop brings.

        Args:
            decoder: in its state of now; None: every token is a piece with no text.
            stops: strings that end the text and are no part of it, none of them empty.
            stop_ids: tokens that do.
            n_unwatched: tokens at the beginning in whose text stop strings do not count.
        """
        cdef unique_ptr[CTextDecoder] own
        cdef vector[string] texts
        cdef vector[int32_t] ids
        for stop in stops:
            texts.push_back(<string><bytes>stop.encode("utf-8"))
        for token in stop_ids:
            ids.push_back(token)
        if decoder is not None:
            own.reset(new CTextDecoder(decoder.decoder))
        self.sink.get().decode_with(move(own), move(texts), move(ids), n_unwatched)

    @property
    def decodes(self):
        """Whether it makes pieces of tokens."""
        return self.sink.get().decodes()

    def add_piece(self, str text not None, token_ids):
        """Take a piece made elsewhere. Returns whether somebody waits for it (see `ready`)."""
        cdef string data = text.encode("utf-8", "replace")
        cdef vector[int32_t] ids
        cdef cbool told
        for token in token_ids:
            ids.push_back(token)
        with nogil:
            told = self.sink.get().add_piece(data, ids)
        return told

    def add_silent(self, token_ids):
        """Take tokens that gave no text to show."""
        cdef vector[int32_t] ids
        for token in token_ids:
            ids.push_back(token)
        self.sink.get().add_silent(ids)

    def close(self):
        """Take nothing any more."""
        self.sink.get().close()

    def take(self):
        """The next piece as (text, index, token ids), or None."""
        cdef TakenPiece piece
        if not self.sink.get().take(piece):
            return None
        return piece.text.decode("utf-8"), piece.index, tuple(piece.token_ids)

    def ready(self):
        """Whether a piece is there; where it is not, `add_piece` or the loop says when the next one is."""
        return self.sink.get().ready()

    def attach(self, ClientStream stream not None, bytes before not None, bytes after not None, bytes end):
        """From now on pieces are bytes of `stream`, by the template given; those that nobody took are the first."""
        cdef CPieceTemplate form = _template(before, after, end)
        self.sink.get().attach(stream.stream, form)

    @property
    def ended_by(self):
        """(stop string, stop token) that ended its text, each None where it did not."""
        cdef pair[string, int32_t] found = self.sink.get().ended_by()
        return found.first.decode("utf-8") or None, found.second if found.second >= 0 else None

    @property
    def text(self):
        """All text so far."""
        return self.sink.get().text().decode("utf-8")

    @property
    def token_ids(self):
        """The tokens of all pieces so far, and the silent ones."""
        return tuple(self.sink.get().token_ids())

    @property
    def n_tokens(self):
        """Their number."""
        return self.sink.get().n_tokens()


cdef class OutputLoop:
    """Brings the tokens of a ring to the sinks of their jobs, for one thread.

    Args:
        ring: what it reads.
        failed: the mark of a sequence that ends without what its text still holds back.
    """

    cdef unique_ptr[COutputLoop] loop
    cdef TokenRing ring

    def __init__(self, TokenRing ring not None, int32_t failed):
        self.ring = ring
        self.loop.reset(new COutputLoop(failed))

    def add(self, seq_id, JobSink sink not None):
        """Bring the tokens of a sequence to `sink`; where that does not decode, they are reported."""
        self.loop.get().add(seq_id, sink.sink)

    def remove(self, seq_id):
        """Drop the tokens of a sequence from now on."""
        self.loop.get().remove(seq_id)

    def run(self, double timeout):
        """Work until there is something to report, `timeout` seconds are over, or the ring is closed and empty.

        Returns:
            list of (sequence, kind, value): WOKEN, a mark of sequence 0; TOKEN, a token of a sequence that is decoded
            elsewhere; MARK, the mark that ends a sequence; STOPPED, one whose text a stop string has ended; PIECE, a
            piece that is waited for. Of one sequence they are in their order, but for PIECE, which may be late.
        """
        cdef vector[Report] reports
        cdef double seconds = min(max(timeout, 0.0), 86400.0)
        with nogil:
            self.loop.get().run(self.ring.queue[0], seconds, reports)
        return [(report.seq_id, report.kind, report.value) for report in reports]
