"""The id of an answer, which is also a job id: POST /cancel takes it and ends all of the answer's jobs."""

from __future__ import annotations

import secrets

#: choices of one answer, of all its prompts together
MAX_CHOICES = 128
CHAT, COMPLETION = "chatcmpl-", "cmpl-"
#: jobs of one answer: its choices, and of each prompt the one that scores it
MAX_JOBS = 2 * MAX_CHOICES


def new_id(prefix: str) -> str:
    """An id that no other answer has."""
    return prefix + secrets.token_hex(16)


def job_ids(answer_id: str, n: int) -> list[str]:
    """The ids of the jobs of one answer: the first is the answer's own."""
    return [answer_id, *(f"{answer_id}-{i}" for i in range(1, n))]


def is_answer(job_id: str) -> bool:
    """Whether a job id looks like an answer's."""
    return job_id.startswith((CHAT, COMPLETION))
