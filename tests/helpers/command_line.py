"""What tests of commands check of every error."""

from __future__ import annotations


def one_error_line(result: tuple[int, str, str], code: str) -> str:
    """The message of a command that failed with `code`: one line on stderr, nothing on stdout, exit code 1."""
    status, out, err = result
    assert status == 1 and out == ""
    assert err.startswith(f"error: {code}: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err
