# distutils: language = c++
# cython: language_level=3
"""Token ids to text by a table of bytes: the table of a vocabulary, and decoders for tokens that come one at a time.

The algorithm is in csrc/host/text_decoder.h; this file checks the arguments. The output loop decodes by the same code
without Python (see _output.pyx).
"""

from libc.stdint cimport uint32_t
from libcpp.memory cimport make_shared, shared_ptr
from libcpp.string cimport string

from worker_orcd.errors import InvalidRequest


cdef class TokenTable:
    """What each token of a vocabulary stands for in bytes.

    Args:
        blob: the bytes of all tokens, one after the other.
        offsets: uint32 [n_vocab + 1], where each token begins in `blob`; the last is its length.
        control: ids of control tokens, which a decoder may leave out.
        strip_space: whether a leading space of a whole text is the tokenizer's own and not the writer's.

    Raises:
        ValueError: offsets that do not fit the blob, or a control token that is no id.
    """

    def __init__(self, bytes blob, const uint32_t[::1] offsets, control, bint strip_space):
        cdef size_t n = offsets.shape[0], i
        cdef CTokenTable* table
        if n < 1 or offsets[0] != 0 or offsets[n - 1] != <size_t>len(blob):
            raise ValueError("offsets must go from 0 to the length of the blob")
        for i in range(1, n):
            if offsets[i] < offsets[i - 1]:
                raise ValueError("offsets must ascend")
        self.table = make_shared[CTokenTable]()
        table = self.table.get()
        table.blob = blob
        table.offsets.assign(&offsets[0], &offsets[0] + n)
        table.control.resize(n - 1)
        for token in control:
            if not 0 <= token < n - 1:
                raise ValueError(f"control token {token} is not in the vocabulary")
            table.control[<size_t>token] = 1
        table.strip_space = strip_space

    @property
    def n_vocab(self):
        """Ids are below this."""
        return self.table.get().n_vocab()

    def token_bytes(self, token):
        """The bytes of a token; empty for an id from `n_vocab` on, which models with padded outputs can produce.

        Raises:
            InvalidRequest: the id is negative.
        """
        cdef CTokenTable* table = self.table.get()
        if token < 0:
            raise InvalidRequest(f"token id {token} is negative", field="ids")
        if token >= table.n_vocab():
            return b""
        return table.data(token)[:table.size(token)]


cdef class TextDecoder:
    """A stream decoder: constant work a token, at most three bytes held back. Used by one thread at a time.

    Args:
        table: bytes of every token.
        skip_control: leave control tokens out.
        continues: the text goes on from a prompt, so a leading space belongs to it.
    """

    def __init__(self, TokenTable table not None, bint skip_control, bint continues):
        self.decoder = CTextDecoder(<shared_ptr[const CTokenTable]>table.table, skip_control, continues)

    def push(self, token):
        """The characters that this token completes; "" while a character is unfinished.

        Raises:
            InvalidRequest: the id is negative.
        """
        cdef string out
        if token < 0:
            raise InvalidRequest(f"token id {token} is negative", field="ids")
        if token < 1 << 31:
            self.decoder.push(token, out)
        return out.decode("utf-8")

    def flush(self):
        """What is still held back: U+FFFD for an unfinished character, else "". The stream is then as new."""
        cdef string out
        self.decoder.flush(out)
        return out.decode("utf-8")
