"""Control and user-defined tokens: which ids they are, where their text occurs, and which of them end generation.

A *control* token means something to the model that no text means (end of turn, start of a role): its text is taken for
the token only where the caller asks. A *user-defined* token is a shorthand for its text and always matched. Which
tokens end generation is told by the file's eos/eot/eom ids and, since many files name only one of those, by the texts
that chat models use.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

#: texts that end a turn or a text wherever they are a token, end of turn first
END_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>", "<end_of_utterance>", "<|return|>", "<|call|>",
)  # fmt: skip
#: texts that do so only where the file types them as control or user-defined: web text holds them too, and vocabularies
#: learned from it (Qwen's) have an ordinary token "</s>"
END_TEXTS_IF_SPECIAL = ("</s>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>", "[e~[", "<turn|>", "<|flush|>",
                        "<|calls|>", "<PAD>", "[PAD]", "<REPO>")  # fmt: skip
#: what a code model writes when the file it was asked to fill is complete
FILL_END_TEXTS = ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<reponame>",
                  "<|file_sep|>")  # fmt: skip
#: control tokens of fill-in-the-middle that some converters type as user-defined
FILL_TEXTS = ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>",
              "<|fim_middle|>", "<fim-middle>", "<fim_middle>")  # fmt: skip
#: formats whose messages end with <|end|> while generation goes on (harmony, and one like it): only these two stop it
MESSAGE_STOPS = (("<|return|>", "<|call|>"), ("<|flush|>", "<|calls|>"))

#: what C's isspace takes for space, the set that the strip flags mean
_SPACE = " \t\n\v\f\r"


def find_known(id_of: Callable[[str], int | None], is_special: Callable[[int], bool]) -> dict[str, int]:
    """Tokens that are control tokens by their well-known text, whatever their file types them as: text -> id.

    Args:
        id_of: the id of a text that is a token, else None.
        is_special: whether the file types an id as control or user-defined.
    """
    found = {t: id_of(t) for t in (*END_TEXTS, *END_TEXTS_IF_SPECIAL, *FILL_END_TEXTS, *FILL_TEXTS)}
    ids = {t: i for t, i in found.items() if i is not None}
    return {t: i for t, i in ids.items() if t not in END_TEXTS_IF_SPECIAL or is_special(i)}


def end_of_turn(ids: Mapping[str, int]) -> int | None:
    """The end-of-turn id of a file that names none.

    Args:
        ids: what `find_known` found.
    """
    return next((ids[t] for t in END_TEXTS if t in ids), None)


def stop_ids(ids: Mapping[str, int], named: Collection[int | None]) -> tuple[int, ...]:
    """Ids that end generation, ascending.

    Args:
        ids: what `find_known` found.
        named: the ids that the file names as eos, eot, eom and ends of a filled-in file, where it does.
    """
    for pair in MESSAGE_STOPS:
        if all(t in ids for t in pair):
            return tuple(sorted(ids[t] for t in pair))
    texts = (*END_TEXTS, *END_TEXTS_IF_SPECIAL, *FILL_END_TEXTS)
    return tuple(sorted({ids[t] for t in texts if t in ids} | {i for i in named if i is not None}))


@dataclass(frozen=True)
class SpecialToken:
    """One token that is found by its text.

    Attributes:
        token: its id.
        text: its text, not empty.
        control: whether it is matched only on request.
        strip_left, strip_right: whether white space beside it is taken with it.
    """

    token: int
    text: str
    control: bool
    strip_left: bool = False
    strip_right: bool = False


class SpecialTokens:
    """Cuts text at special tokens.

    The longest token is looked for first, over the whole text, then the next: where two overlap, the longer one wins.
    That is the order of llama.cpp, which the reference ids come from.
    """

    def __init__(self, tokens: Collection[SpecialToken]) -> None:
        self._tokens = sorted(tokens, key=lambda t: (-len(t.text.encode()), t.token))
        #: a text with none of these has no special token; there are few, while the tokens can be hundreds
        self._heads = {special: {t.text[:2] for t in tokens if special or not t.control} for special in (False, True)}

    def only(self, wanted: Callable[[SpecialToken], bool]) -> SpecialTokens:
        """Those of these tokens that are `wanted`."""
        return SpecialTokens([t for t in self._tokens if wanted(t)])

    def _may_hold(self, text: str, special: bool) -> bool:
        return any(head in text for head in self._heads[special])

    @property
    def tokens(self) -> list[SpecialToken]:
        """All of them, longest first."""
        return self._tokens

    def cut(self, text: str, special: bool) -> list[str | int]:
        """The text as fragments: a str is text, an int is the id of a special token. No fragment is empty.

        Args:
            text: any text.
            special: whether control tokens are matched too.
        """
        fragments: list[str | int] = [text] if text else []
        if not self._may_hold(text, special):
            return fragments
        for token in self._tokens:
            if (special or not token.control) and token.text in text:
                fragments = _cut_one(fragments, token)
        return fragments


def _cut_one(fragments: list[str | int], token: SpecialToken) -> list[str | int]:
    out: list[str | int] = []
    for fragment in fragments:
        if isinstance(fragment, int):
            out.append(fragment)
            continue
        parts = fragment.split(token.text)
        for i, part in enumerate(parts):
            if i:
                out.append(token.token)
                if token.strip_right:
                    part = part.lstrip(_SPACE)
            if token.strip_left and i < len(parts) - 1:
                part = part.rstrip(_SPACE)
            if part:
                out.append(part)
    return out
