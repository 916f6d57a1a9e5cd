"""The added tokens of a tokenizer.json: where they are in a text, found by the library itself.

Whether a token takes the white space beside it along, or is one only as a word of its own, and which of two that
overlap wins, are the library's rules. So it does the looking, in a tokenizer that has these tokens and no others:
what it finds nothing in is the text between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tokenizers import AddedToken, Tokenizer, models

from worker_orcd.errors import InvalidRequest
from worker_orcd.tokenizer.library import failing_as
from worker_orcd.tokenizer.special_tokens import SpecialToken, SpecialTokens


class AddedTokens(SpecialTokens):
    """Cuts text at the added tokens of a tokenizer.json.

    The library looks for a *normalized* token in normalized text. Here nothing is normalized: a special token is held
    to its own text, so that no other becomes a control token, and one that is not special is left for the library to
    find in the fragments.

    Args:
        added: id -> token, as the library's `get_added_tokens_decoder` gives them.
    """

    def __init__(self, added: Mapping[int, AddedToken]) -> None:
        self._added = {i: t for i, t in added.items() if t.content and (t.special or not t.normalized)}
        super().__init__([SpecialToken(i, t.content, t.special, t.lstrip, t.rstrip) for i, t in self._added.items()])
        self._finder = Tokenizer(models.BPE())
        self._finder.add_tokens(list(self._added.values()))
        self._ids = {self._finder.token_to_id(t.content): i for i, t in self._added.items()}

    def only(self, wanted: Callable[[SpecialToken], bool]) -> AddedTokens:
        """See `SpecialTokens.only`."""
        return AddedTokens({t.token: self._added[t.token] for t in self._tokens if wanted(t)})

    def cut(self, text: str, special: bool) -> list[str | int]:
        """See `SpecialTokens.cut`; without `special` nothing is cut, since `encode` finds the tokens that are left.

        Raises:
            InvalidRequest: the library gives up on the text.
        """
        if not text or not special or not self._may_hold(text, special):
            return [text] if text else []
        with failing_as(lambda reason: InvalidRequest(f"text cannot be tokenized: {reason}", field="text")):
            found = self._finder.encode(text, add_special_tokens=False)
        fragments: list[str | int] = []
        at = 0
        for token, (start, end) in zip(found.ids, found.offsets, strict=True):
            if at < start:
                fragments.append(text[at:start])
            fragments.append(self._ids[token])
            at = end
        return [*fragments, text[at:]] if at < len(text) else fragments
