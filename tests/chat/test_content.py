"""Content in the form that a template wants, found out by running it."""

from __future__ import annotations

from typing import Any

import pytest

from worker_orcd.chat.content import MAX_RUNS, Conversation, Null, Part, Parts, WantsString, users
from worker_orcd.chat.environment import compiled
from worker_orcd.chat.provenance import USER, Text, origins_of

LISTED = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]


def rendered(source: str, *messages: tuple[str, Any]) -> str:
    environment, template = compiled(source)

    def work(messages: list[dict[str, Any]], finds_parts: bool) -> str:
        environment.finds_parts = finds_parts
        return template.render(messages=messages)

    return Conversation([{"role": r, "content": c} for r, c in messages]).run(work)


def each(body: str) -> str:
    return "{% for m in messages %}" + body + ";{% endfor %}"


LOOP = "{% for p in m.content %}{% if p.type == 'text' %}[{{ p.text }}]{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    "body",
    ["{{ m.content }}", "{{ '' + m.content }}", "{{ m.content + '' }}", "{{ m.content ~ '' }}",
     "{{ '%s' % m.content }}",
     "{{ m.content | trim }}", "{{ m['content'] | string }}", "{{ '{}'.format(m.content) }}",
     "{{ [m.content] | join }}",
     "{{ m.content.strip() }}", "{{ m.content.split('#')[0] }}", "{{ m.content | replace('#', '') }}",
     "{% if '</think>' in m.content %}{% endif %}{{ m.content }}", "{{ ['', m.content] | join }}",
     "{% if m.content is string %}{{ m.content }}{% endif %}", "{{ m.content[:99] }}", "{{ m.content | indent(0) }}",
     "{% if m.content is mapping %}{% elif m.content is iterable %}{{ m.content }}{% endif %}",
     "{% for p in m.content %}{{ p }}{% endfor %}", "{{ m.content | upper | lower }}"],
)  # fmt: skip
def test_templates_that_want_strings_get_the_parts_in_lines(body):
    assert rendered(each(body), ("system", LISTED), ("user", "three")) == "one\ntwo;three;"


def test_json_of_a_content_is_that_of_a_string():
    assert rendered(each("{{ m.content | tojson }}"), ("tool", LISTED)) == '"one\\ntwo";'
    assert rendered("{{ messages | tojson }}", ("tool", LISTED)) == '[{"role": "tool", "content": "one\\ntwo"}]'


@pytest.mark.parametrize(
    "body",
    [LOOP, "{% if m.content is string %}{{ m.content }}{% else %}" + LOOP + "{% endif %}",
     "{% for p in m.content | selectattr('type', 'equalto', 'text') %}[{{ p['text'] }}]{% endfor %}",
     "[{{ m.content[0].text }}][{{ (m.content | last).text }}]",
     "[{{ m.content | map(attribute='text') | join('][') }}]",
     "{% for p in m.content[0:] %}[{{ p.text }}]{% endfor %}",
     "{% for p in m.content %}{% for k, v in p.items() %}{{ '[' ~ v ~ ']' if k == 'text' }}{% endfor %}{% endfor %}"],
)  # fmt: skip
def test_templates_that_go_through_parts_get_the_list(body):
    assert rendered(each(body), ("user", LISTED)) == "[one][two];"


def test_each_role_is_given_its_form():
    body = "{% if m.role == 'user' %}" + LOOP + "{% else %}{{ '#' + m.content }}{% endif %}"
    said = [("system", LISTED), ("user", LISTED), ("assistant", LISTED), ("assistant", "three"), ("user", LISTED)]
    assert rendered(each(body), *said) == "#one\ntwo;[one][two];#one\ntwo;#three;[one][two];"


def test_strings_become_one_part_where_a_template_knows_nothing_else():
    body = "{% if m.role == 'user' %}" + LOOP + "{% else %}{{ '#' + m.content }}{% endif %}"
    assert rendered(each(body), ("system", "one"), ("user", "two"), ("user", LISTED)) == "#one;[two];[one][two];"


def test_a_template_that_skips_a_message_is_left_alone():
    body = "{% if m.role == 'user' %}" + LOOP + "{% endif %}"
    assert rendered(each(body), ("system", LISTED), ("user", LISTED)) == ";[one][two];"


@pytest.mark.parametrize(
    ("body", "text"),
    [("{{ m.content }}", ""), ("{{ '#' + m.content }}", "#"), ("{{ m.content + '#' }}", "#"),
     ("{{ m.content.strip() }}", ""),
     ("{% if m.content %}no{% endif %}", ""), ("{% if m.content is none %}none{% endif %}", "none"),
     ("{{ m.content is string }}", "False"), ("{{ m.content == none }}", "True"),
     ("{{ m.content is defined }}", "True"),
     ("{% if m.content is not none %}no{% endif %}", ""), ("{{ m.content | default('#', true) }}", "#"),
     ("{{ m.content | trim }}", ""), ("{% if '#' in m.content %}{% endif %}", ""), ("{{ m.content | tojson }}", '""'),
     ("{{ m | tojson }}", '{"role": "assistant", "content": null}'), ("{{ m.content | length }}", "0"),
     ("{{ m.content[:3] }}", ""), ("{{ m.content * 2 }}", ""), ("{{ m.content < 'a' }}", "True"),
     ("{% for p in m.content %}{% endfor %}", "")],
)  # fmt: skip
def test_no_content_is_none_until_it_becomes_text(body, text):
    assert rendered(each(body), ("assistant", None)) == text + ";"


def test_no_key_content_is_no_text():
    _, template = compiled("{{ '#' + messages[0].content }}")
    assert Conversation([{"role": "assistant"}]).run(lambda m, _: template.render(messages=m)) == "#"


def test_a_refusal_is_that_of_the_strings():
    source = "{% if messages[0].content is string %}{{ raise_exception('a string') }}{% endif %}{{ 1 // 0 }}"
    with pytest.raises(Exception, match="a string"):
        rendered(source, ("user", LISTED))
    with pytest.raises(ZeroDivisionError):
        rendered("{{ 1 // 0 }}", ("user", "x"))


def test_runs_are_few_whatever_the_messages():
    runs = []

    def work(messages: list[dict[str, Any]], finds_parts: bool) -> str:
        runs.append(1)
        return "".join(map(str, (m["content"] for m in messages)))

    messages = [{"role": f"r{i}", "content": [{"type": "text", "text": str(i)}]} for i in range(20)]
    assert Conversation(messages).run(work) == "".join(map(str, range(20)))
    assert len(runs) == MAX_RUNS


def test_what_a_part_is():
    part = Part({"type": "text", "text": "x", "title": "y"}, "user")
    parts = Parts([part], "user", lambda: None)
    assert dict(part) == {"type": "text", "text": "x", "title": "y"}
    assert (len(part), len(parts), list(parts), parts[0], part in parts) == (3, 1, [part], part, True)
    assert not Null("user") and Null("user") == None  # noqa: E711
    for value in (part, parts, Null("user")):
        for use in (str, repr, lambda v: v + "", lambda v: "" + v, lambda v: v.strip, lambda v: f"{v}"):
            with pytest.raises(WantsString, match="content of user"):
                use(value)
        assert not hasattr(value, "nothing")
    assert not hasattr(part, "title")


CALLS = [{"name": "é'", "arguments": {"x": [None, True, 1.5, "a"], "y": {}}}]


@pytest.mark.parametrize(
    "body",
    ["{{ m.calls }}", "{{ '' ~ m.calls }}", "{{ '%s' % m.calls }}", "{{ m.calls | string }}", "{{ m.calls | trim }}",
     "{{ [m.calls] | join }}", "{{ '{}'.format(m.calls) }}"],
)  # fmt: skip
def test_lists_and_objects_are_printed_as_transformers_prints_them(body):
    _, template = compiled("{% set m = messages[0] %}" + body)
    text = Conversation([{"role": "assistant", "calls": CALLS}]).run(lambda m, _: template.render(messages=m))
    assert text == str(CALLS)
    assert USER * len(text) == origins_of(text)


def test_a_conversation_is_printed_with_content_in_the_form_that_it_has_as_text():
    expected = str([{"role": "user", "content": "one\ntwo"}, {"role": "assistant", "content": ""}])
    assert rendered("{{ messages }}", ("user", LISTED), ("assistant", None)) == expected


def test_calls_are_not_lost_where_a_template_fails_of_something_else():
    source = each("{% if m.content is none %}{{ 'call ' + m.call }}{% else %}{{ m.content }}{% endif %}")
    _, template = compiled(source)

    def run(**message: Any) -> str:
        messages = [{"role": "user", "content": LISTED}, {"role": "assistant", **message}]
        return Conversation(messages).run(lambda m, _: template.render(messages=m))

    assert run(content=None, call="f") == run(call="f") == "one\ntwo;call f;"
    with pytest.raises(TypeError, match="concatenate str"):  # and no answer without the call
        run(content=None, call={"name": "f"})


def test_a_template_that_refuses_null_gets_an_empty_string():
    source = each("{% if m.content is not string %}{{ raise_exception('no text') }}{% endif %}[{{ m.content }}]")
    assert rendered(source, ("assistant", None)) == "[];"


@pytest.mark.parametrize("content", ["hi", LISTED])
def test_strings_are_one_part_for_templates_that_know_parts_only(content):
    source = each("{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}")
    source, template = compiled(source)

    def work(messages: list[dict[str, Any]], finds_parts: bool) -> str:
        source.finds_parts = finds_parts
        return template.render(messages=messages)

    messages = [{"role": "user", "content": content}, {"role": "user", "content": "you"}]
    assert Conversation(messages).run(work) == ("hi" if content == "hi" else "onetwo") + ";you;"


def test_users_text_is_marked_in_every_depth():
    value = users({"a": ["b", {"c": "d"}], "n": 5, "e": ""})
    assert value == {"a": ["b", {"c": "d"}], "n": 5, "e": ""}
    assert [type(k) for k in value] == [Text, Text, Text]
    assert (type(value["a"][0]), type(value["a"][1]["c"]), type(value["e"])) == (Text, Text, str)
