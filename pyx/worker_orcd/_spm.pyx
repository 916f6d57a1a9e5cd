# distutils: language = c++
"""Score-ranked merging of neighbouring pieces (SentencePiece's BPE), O(n log n) in the text.

The algorithm is in csrc/host/spm_bpe.h; this file checks the arguments, owns the vocabulary and lets other Python
threads run meanwhile.
"""

from libc.stdint cimport int32_t, uint32_t
from libcpp.vector cimport vector

cdef extern from "host/spm_bpe.h" namespace "worker_orcd" nogil:
    cdef cppclass SpmVocab:
        SpmVocab() except +
        void build(const char *blob, const uint32_t *offsets, const float *scores, size_t n_vocab) except +
    void spm_merge(const SpmVocab &vocab, const char *text, size_t n_bytes, const int32_t *byte_ids,
                   int32_t unk_id, vector[int32_t] &out) except +

#: pieces are linked by 32-bit indices
cdef enum: MAX_BYTES = 1 << 30


cdef class SpmMerger:
    """A vocabulary with scores, ready to tokenize.

    Args:
        blob: UTF-8 of all tokens, one after the other; an empty token is never produced by a merge.
        offsets: uint32 [n_vocab + 1], where each token starts in `blob`.
        scores: float32 [n_vocab], finite; larger merges first.
        byte_ids: int32 [256] ids of the byte tokens, or [0] where there are none.
        unk_id: id for a character without token where there are no byte tokens, else -1.

    Raises:
        ValueError: lengths that do not fit each other.
    """

    cdef SpmVocab vocab
    cdef int32_t byte_ids[256]
    cdef bint has_bytes
    cdef int32_t unk_id

    def __init__(self, bytes blob not None, const uint32_t[::1] offsets not None, const float[::1] scores not None,
                 const int32_t[::1] byte_ids not None, int unk_id):
        cdef Py_ssize_t n_vocab = scores.shape[0], i
        cdef const char *data = blob
        if offsets.shape[0] != n_vocab + 1 or offsets[0] != 0 or offsets[n_vocab] != len(blob):
            raise ValueError("offsets do not fit the tokens")
        for i in range(n_vocab):
            if offsets[i] > offsets[i + 1]:
                raise ValueError("offsets decrease")
        if byte_ids.shape[0] not in (0, 256):
            raise ValueError("byte_ids has neither 0 nor 256 elements")
        self.has_bytes = byte_ids.shape[0] == 256
        for i in range(byte_ids.shape[0]):
            self.byte_ids[i] = byte_ids[i]
        self.unk_id = unk_id
        if n_vocab:
            self.vocab.build(data, &offsets[0], &scores[0], n_vocab)

    def encode(self, bytes text not None):
        """Ids of `text` (valid UTF-8), as a list of int.

        Raises:
            OverflowError: the text is longer than 2^30 bytes.
        """
        cdef vector[int32_t] out
        cdef const char *data = text
        cdef size_t n_bytes = len(text)
        if n_bytes > MAX_BYTES:
            raise OverflowError("text of more than 2^30 bytes cannot be tokenized")
        cdef const int32_t *byte_ids = NULL
        if self.has_bytes:
            byte_ids = self.byte_ids
        with nogil:
            spm_merge(self.vocab, data, n_bytes, byte_ids, self.unk_id, out)
        return [out[i] for i in range(out.size())]
