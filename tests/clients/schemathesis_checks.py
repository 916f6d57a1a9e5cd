"""What schemathesis checks here beyond its own: what the document allows is taken, unless it has too many tokens.

How many tokens a text has no schema can say, so its own check of that name would hold against no model.
"""

from __future__ import annotations

import schemathesis

#: of the message where tokens were counted
OF_TOKENS = ("context", "positions", "tokens")


@schemathesis.check
def allowed_is_taken(ctx, response, case) -> None:
    """A request that the document allows is no 400."""
    del ctx
    if case.meta is None or not case.meta.generation.mode.is_positive or response.status_code != 400:
        return
    text = response.content.decode("utf-8", "replace")
    assert any(word in text for word in OF_TOKENS), f"allowed by the document, and refused: {text[:300]}"
