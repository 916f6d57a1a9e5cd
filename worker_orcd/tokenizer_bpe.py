"""`gguf-bpe`: byte-level BPE built from a GGUF vocabulary, its merges and the split that `tokenizer.ggml.pre` names.

The library does the splitting and merging (a heap, so even one word of 10^6 characters is n log n); this file knows
which regular expressions belong to which name. Control and user-defined tokens are cut out before text gets here
(special_tokens.py), so the library's own added tokens stay empty.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from worker_orcd.errors import InvalidRequest, ModelLoadError
from worker_orcd.tokenizer_metadata import TokenizerMetadata

_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_O200K_REST = rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_GPT4O = _TEKKEN_WORDS % (_CONTRACTION + "?", _CONTRACTION + "?") + r"|\p{N}{1,3}" + _O200K_REST
_TEKKEN = _TEKKEN_WORDS % ("", "") + r"|\p{N}" + _O200K_REST
#: letters with case (\p{Lu}, \p{Ll}, \p{Lt}) as DeepSeek's first tokenizers list them
_DEEPSEEK_LETTERS = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"  # noqa: E501
_HAN_KANA_HANGUL = r"[一-龥ࠀ-一가-퟿]+"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + _SPACES,
)

#: `tokenizer.ggml.pre` -> regular expressions applied one after the other: each cuts every piece that the one before it
#: left into its matches and the text between them. Taken from the models' published tokenizer.json files.
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), (_QWEN2,)),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), (r"\p{N}", _GPT2)),
    "gpt-4o": (_GPT4O,),
    "llama4": (_GPT4O,),
    "tekken": (_TEKKEN,),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    "deepseek-llm": (r"[\r\n]", _DEEPSEEK_LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _HAN_KANA_HANGUL, r"\p{N}+"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_KANA_HANGUL, r"\p{N}"),
    "deepseek-v3": _DEEPSEEK3,
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}

#: a word that is a token as it stands is that token, whatever the merges would make of it
_WHOLE_WORDS_FIRST = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"})

#: From this length on the library's batch call is used, which leaves out character offsets (0.3 s instead of 0.5 s for
#: 10^6 characters). Not for shorter text: it starts a thread pool, which warns about every later fork.
_LONG_TEXT = 1 << 16


class BpeEncoder:
    """Text without special tokens -> ids. Safe to use from several threads.

    Args:
        meta: a checked vocabulary with `model` "gpt2".

    Raises:
        ModelLoadError: `meta.pre` is not in `PRE_TOKENIZERS`, or the library refuses vocabulary or merges.
    """

    def __init__(self, meta: TokenizerMetadata) -> None:
        splits = PRE_TOKENIZERS.get(meta.pre)
        if splits is None:
            known = ", ".join(sorted(PRE_TOKENIZERS))
            raise ModelLoadError(
                f"tokenizer.ggml.pre names the unknown pre-tokenizer {meta.pre[:64]!r}; supported are {known}",
                meta.path,
                field="tokenizer.ggml.pre",
            )
        # of a merge given twice the first, better rank counts; the library would take the last
        merges = meta.merges if len(set(meta.merges)) == len(meta.merges) else list(dict.fromkeys(meta.merges))
        try:
            model = models.BPE(vocab=meta.vocab, merges=merges, ignore_merges=meta.pre in _WHOLE_WORDS_FIRST)
        except Exception as e:  # the library raises bare Exception
            raise ModelLoadError(f"tokenizer.ggml.merges: {e}", meta.path, field="tokenizer.ggml.merges") from None
        self._tokenizer = Tokenizer(model)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r), "isolated") for r in splits]
            + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )

    def encode(self, text: str, first: bool) -> list[int]:
        """Ids of a fragment of text (`first`: it starts the whole text; no matter here)."""
        return encode_with(self._tokenizer, text)


def encode_with(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of `text` from a `tokenizers.Tokenizer`, without its template's special tokens.

    Raises:
        InvalidRequest: the text holds lone surrogates, or the library gives up on it.
    """
    try:
        if len(text) < _LONG_TEXT:
            return tokenizer.encode(text, add_special_tokens=False).ids
        return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    except UnicodeEncodeError:
        raise InvalidRequest("text holds surrogate code points, which no UTF-8 text can", field="text") from None
    except Exception as e:  # the library raises bare Exception
        raise InvalidRequest(f"text cannot be tokenized: {e}", field="text") from None
