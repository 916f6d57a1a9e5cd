#!/usr/bin/env bash
# oss-harmony reads the content type of a message that it wrote itself as a recipient.
#
# Versions   oss-harmony 0.0.11 (module openai_harmony)
# Expected   a message with channel "final" and content type "<|constrain|>json" is rendered and parsed back to the same
#            message.
# Behaviour  it is rendered as `<|channel|>final <|constrain|>json<|message|>`, and parsed to a message without a content
#            type whose recipient is "<|constrain|>json". With a recipient of its own (`to=functions.f`) the content type
#            survives.
# Matters    a server that decides by the recipient whether a message is a tool call takes a structured final answer for
#            one.
# Output seen on 2026-11-28:
#   rendered: <|start|>assistant<|channel|>final <|constrain|>json<|message|>{}<|end|>
#   parsed:   recipient '<|constrain|>json', content_type None
#   rendered: <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>
#   parsed:   recipient 'functions.f', content_type '<|constrain|>json'
#   as found: without a recipient the content type becomes one
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check oss-harmony==0.0.11
cd "$work"
venv/bin/python - <<'PY'
import sys

from openai_harmony import HarmonyEncodingName, Message, Role, load_harmony_encoding

encoding = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)


def round_trip(message):
    """(recipient, content type) of a message that was rendered and parsed."""
    tokens = encoding.render(message)
    print("rendered:", encoding.decode_utf8(tokens))
    # a model is given <|start|>assistant, and what it generates comes after these two tokens
    (parsed,) = encoding.parse_messages_from_completion_tokens(tokens[2:], Role.ASSISTANT)
    print(f"parsed:   recipient {parsed.recipient!r}, content_type {parsed.content_type!r}")
    return parsed.recipient, parsed.content_type


answer = Message.from_role_and_content(Role.ASSISTANT, "{}").with_content_type("<|constrain|>json")
final = round_trip(answer.with_channel("final"))
call = round_trip(answer.with_channel("commentary").with_recipient("functions.f"))
if final != ("<|constrain|>json", None) or call != ("functions.f", "<|constrain|>json"):
    sys.exit("changed: the messages read back as something else")
print("as found: without a recipient the content type becomes one")
PY
