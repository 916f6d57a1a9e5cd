"""`gguf-bpe`: byte-level BPE built from a GGUF vocabulary, its merges and the split that `tokenizer.ggml.pre` names.

The library does the splitting and merging (a heap, so even one word of 10^6 characters is n log n); this file knows
which regular expressions belong to which name. Control and user-defined tokens are cut out before text gets here
(special_tokens.py), so the library's own added tokens stay empty.
"""

from __future__ import annotations

from collections.abc import Collection

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from worker_orcd.errors import ModelLoadError, quoted
from worker_orcd.tokenizer.library import encode_with, failing_as, keep_from_text
from worker_orcd.tokenizer.metadata import TokenizerMetadata

_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
#: `\p{N}` and then _GPT2 on what lies between, as one expression: half the time. A piece ends before each digit, so
#: that is where `\s+(?!\S)` may end too.
_DIGIT_GPT2 = r"\p{N}|" + _GPT2.replace(r" ?\p{N}+|", "").replace(r"(?!\S)", r"(?![^\s\p{N}])")
_LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_O200K_REST = rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_GPT4O = _TEKKEN_WORDS % (_CONTRACTION + "?", _CONTRACTION + "?") + r"|\p{N}{1,3}" + _O200K_REST
_TEKKEN = _TEKKEN_WORDS % ("", "") + r"|\p{N}" + _O200K_REST
#: letters with upper and lower case as DeepSeek's first tokenizers list them (an older and incomplete \p{L&}), as
#: hexadecimal ranges: written as characters, Unicode normalization of a source file turns ends of ranges into others
_DEEPSEEK_LETTERS = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A "
    "38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF "
    "1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D "
    "1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 "
    "1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F "
    "2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F "
    "A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 "
    "104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
#: DeepSeek's first tokenizers begin by cutting out each line break; here they do so last, and white space elsewhere is
#: none of them. The pieces are the same, and 10^6 line breaks go through one pass instead of five.
_BLANK = r"[^\S\r\n]"
_HAN_KANA_HANGUL = r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + _SPACES,
)


def _hex_class(ranges: str) -> str:
    """The inside of a character class, from "41-5A 61" and the like."""
    return "".join("-".join(rf"\x{{{end}}}" for end in r.split("-")) for r in ranges.split())


#: `tokenizer.ggml.pre` -> regular expressions applied one after the other: each cuts every piece that the one before it
#: left into its matches and the text between them. Taken from the models' published tokenizer.json files.
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), (_QWEN2,)),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), (_DIGIT_GPT2,)),
    "gpt-4o": (_GPT4O,),
    "llama4": (_GPT4O,),
    "tekken": (_TEKKEN,),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    "deepseek-llm": (
        rf"{_BLANK}?[{_hex_class(_DEEPSEEK_LETTERS)}]+",
        rf"{_BLANK}?[{_hex_class('21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002')}]+",
        rf"{_BLANK}+(?=[\r\n]|$)",
        _HAN_KANA_HANGUL,
        r"\p{N}+|[\r\n]",
    ),
    "deepseek-coder": (rf"{_BLANK}?\p{{L}}+", rf"{_BLANK}?\p{{P}}+", _HAN_KANA_HANGUL, r"[\p{N}\r\n]"),
    "deepseek-v3": _DEEPSEEK3,
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}

#: a word that is a token as it stands is that token, whatever the merges would make of it
_WHOLE_WORDS_FIRST = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"})


class BpeEncoder:
    """Text without special tokens -> ids. Safe to use from several threads.

    Args:
        meta: a checked vocabulary with `model` "gpt2".
        control: ids of control tokens, which no text becomes.

    Raises:
        ModelLoadError: `meta.pre` is not in `PRE_TOKENIZERS`, or the library refuses vocabulary or merges.
    """

    def __init__(self, meta: TokenizerMetadata, control: Collection[int]) -> None:
        splits = PRE_TOKENIZERS.get(meta.pre)
        if splits is None:
            known = ", ".join(sorted(PRE_TOKENIZERS))
            raise ModelLoadError(
                f"tokenizer.ggml.pre names the unknown pre-tokenizer {quoted(meta.pre)}; supported are {known} (with "
                "--tokenizer the model's tokenizer.json takes its place)",
                meta.path,
                field="tokenizer.ggml.pre",
            )
        # of a merge given twice the first, better rank counts; the library would take the last
        merges = meta.merges if len(set(meta.merges)) == len(meta.merges) else list(dict.fromkeys(meta.merges))
        with failing_as(lambda reason: ModelLoadError(f"tokenizer.ggml.merges: {reason}", meta.path)):
            model = models.BPE(vocab=meta.vocab, merges=merges, ignore_merges=meta.pre in _WHOLE_WORDS_FIRST)
        self._tokenizer = Tokenizer(model)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r), "isolated") for r in splits]
            + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        keep_from_text(self._tokenizer, [meta.tokens[i] for i in sorted(control)])

    def encode(self, text: str, first: bool) -> list[int]:
        """Ids of a fragment of text (`first`: it starts the whole text; no matter here)."""
        return encode_with(self._tokenizer, text)
