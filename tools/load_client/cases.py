"""What jobs ask for: cases that come again and again, and prompts that never do."""

from __future__ import annotations

import random

from load_client.routes import Case

#: short words, so that the characters that a prompt may have hold many tokens
WORDS = (
    "a", "an", "the", "of", "to", "in", "on", "at", "by", "we", "he", "it", "is", "was", "be", "do", "go", "no",
    "so", "up", "as", "if", "or", "my", "me", "us", "you", "all", "and", "for", "not", "but", "one", "two", "red",
    "sun", "sea", "sky", "day", "old", "new", "big", "boy", "cat", "dog", "tree", "fire", "rain", "wind", "moon",
    "star", "time", "word", "book", "home", "hand", "road",
)  # fmt: skip
#: characters of a prompt, at most
MAX_PROMPT_CHARS = 32_000


def words(rng: random.Random, n: int) -> str:
    """`n` words."""
    return " ".join(rng.choices(WORDS, k=n))


def repeated(rng: random.Random, n: int, n_context: int, max_tokens: int) -> list[Case]:
    """Cases of mixed lengths, greedy and drawn, some with a common beginning and some with a stop string.

    Args:
        n: how many.
        n_context: positions of the context.
        max_tokens: tokens that a job may generate at most.
    """
    beginning = words(rng, min(120, n_context // 16))
    cases = []
    for i in range(n):
        prompt = words(rng, rng.choice([k for k in (2, 10, 40, 150, 400) if k <= n_context // 16 + 2]))
        cases.append(
            Case(
                prompt=f"{beginning} {prompt}" if i % 3 == 0 else prompt,
                max_tokens=min(max_tokens, rng.choice((1, 8, 24, 64, 160)), n_context // 4),
                temperature=0.0 if i % 2 else round(rng.uniform(0.5, 1.5), 2),
                seed=rng.randrange(1 << 32),
                stop=("e", "zz") if i % 5 == 4 else (),
            )
        )
    return cases


def long_answers(rng: random.Random, n: int, n_context: int, max_tokens: int) -> list[Case]:
    """Cases whose answers are as long as may be: for who leaves in the middle of one, or does not read."""
    most = min(max_tokens, n_context - n_context // 4)
    return [Case(words(rng, 8), most, 1.0, rng.randrange(1 << 32)) for _ in range(n)]


def fresh(rng: random.Random, n_tokens: int, chars_per_token: float) -> Case:
    """A prompt of about `n_tokens` tokens whose beginning nobody has sent before: no cache knows it."""
    n_chars = min(int(n_tokens * chars_per_token), MAX_PROMPT_CHARS)
    text = f"{rng.randrange(1 << 64):x} " + words(rng, n_chars // 3)
    return Case(text[:n_chars], 64, 1.0, rng.randrange(1 << 32))
