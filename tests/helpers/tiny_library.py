"""A tokenizer of the library `tokenizers` with a handful of tokens, to be saved and damaged."""

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library


def tiny_library(tokens=("a", "b", "c", "d"), special=("<|end|>",), decoder=None) -> Library:
    library = Library(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    library.decoder = decoder or decoders.ByteLevel()
    library.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return library
