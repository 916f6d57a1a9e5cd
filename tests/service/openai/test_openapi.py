"""The OpenAPI document (openapi.py, types.py, answers.py) against the routes, the rules and the answers."""

from __future__ import annotations

import json
import re

import pytest

from service.in_process import App
from service.openai.asking import CHAT, COMPLETIONS, ok
from worker_orcd.config import MAX_LOGPROBS, MAX_STOPS
from worker_orcd.runtime.request import HTTP_FIELDS, RULES
from worker_orcd.wsgi.app import ROUTES
from worker_orcd.wsgi.middleware import OPEN_FOLDER, OPEN_PATHS
from worker_orcd.wsgi.native.execute import ExecuteBody
from worker_orcd.wsgi.openai.openapi import below
from worker_orcd.wsgi.openai.operations import OPERATIONS
from worker_orcd.wsgi.openai.types import ChatBody, CompletionBody


def document(app):
    result = app.client.simulate_get("/openapi.json")
    assert result.status_code == 200
    return result.json


def test_every_route_and_method_is_there(app):
    paths = document(app)["paths"]
    for path, resource in ROUTES:
        shown = paths[path.replace(":path}", "}")]
        methods = {m for m in ("get", "post") if hasattr(resource, f"on_{m}")}
        assert methods == set(shown) - {"parameters"}, path
        for method in methods:
            assert shown[method]["summary"]
            assert ("requestBody" in shown[method]) == (method == "post" and path != "/shutdown")
    assert set(OPERATIONS) <= {path for path, _ in ROUTES}


@pytest.mark.parametrize(
    ("path", "route", "headers"),
    [
        ("/", "/", {}),
        ("/", "/", {"If-None-Match": "*"}),
        ("/metrics", "/metrics", {}),
        ("/metrics", "/metrics", {"Accept": "application/openmetrics-text; version=1.0.0"}),
        *((f"/static/{name}", "/static/{name}", {}) for name in ("main.js", "style.css", "icon.svg", "no.js")),
        ("/static/main.js", "/static/{name}", {"If-None-Match": "*"}),
        ("/health", "/health", {}),
        ("/ready", "/ready", {}),
        ("/v1/models", "/v1/models", {}),
        ("/v1/models/nobody", "/v1/models/{model}", {}),
        ("/openapi.json", "/openapi.json", {}),
    ],
)
def test_what_is_got_is_of_a_kind_that_the_document_names(app, path, route, headers):
    result = app.client.simulate_get(path, headers=headers)
    told = document(app)["paths"][route]["get"]["responses"][str(result.status_code)]
    kind = result.headers.get("content-type", "").split(";")[0]
    assert (kind in told["content"]) if result.content else (told["content"] == {}), (kind, told)


def test_every_reference_leads_somewhere(app):
    whole = document(app)
    names = set(re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(whole)))
    assert names and names <= set(whole["components"]["schemas"])
    assert whole["openapi"].startswith("3.1") and whole["info"]["version"]


@pytest.mark.parametrize(("name", "body"), [("CompletionBody", CompletionBody), ("ChatBody", ChatBody)])
def test_every_field_has_its_rule(app, name, body):
    schema = document(app)["components"]["schemas"][name]
    fields = schema["properties"]
    assert list(fields) == list(body.__struct_fields__)
    for field in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"):
        assert (fields[field]["minimum"], fields[field]["maximum"]) == (RULES[field].least, RULES[field].most)
    assert fields["repetition_penalty"]["exclusiveMinimum"] == 0
    assert (fields["top_k"]["minimum"], fields["top_k"]["maximum"]) == (-1, 512)
    assert fields["max_tokens"]["maximum"] == fields["min_tokens"]["maximum"] == 2048
    assert fields["stop"]["maxItems"] == MAX_STOPS and fields["n"]["maximum"] == 96
    assert fields["logprobs" if name == "CompletionBody" else "top_logprobs"]["maximum"] == MAX_LOGPROBS
    assert fields["stop_token_ids"]["items"]["maximum"] == 511 and "additionalProperties" not in schema


def test_the_rules_of_execute(app):
    schema = document(app)["components"]["schemas"]["ExecuteBody"]
    assert list(schema["properties"]) == list(ExecuteBody.__struct_fields__) and not schema["additionalProperties"]
    for name in HTTP_FIELDS:
        assert schema["properties"][name].get("maximum") or name == "stop"


def test_a_key_and_a_loading_model():
    app = App(api_key="k")
    result = app.client.simulate_get("/openapi.json", headers={"Authorization": "Bearer k"})
    whole = result.json
    assert whole["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert whole["paths"][CHAT]["post"]["security"] and "401" in whole["paths"][CHAT]["post"]["responses"]
    for path, resource in ROUTES:
        shown = whole["paths"][path.replace(":path}", "}")]
        is_open = path in OPEN_PATHS or path.startswith(OPEN_FOLDER)
        for method in {"get", "post"} & set(shown):
            assert ("security" not in shown[method]) == ("401" not in shown[method]["responses"]) == is_open, path
        if hasattr(resource, "on_get"):
            answered = app.client.simulate_get(path.replace("{name}", "chat.js").replace("{model:path}", "m"))
            assert (answered.status_code != 401) == is_open, path
    assert "maximum" not in whole["components"]["schemas"]["CompletionBody"]["properties"]["top_k"]


def test_answers_hold_what_their_schemas_say(app):
    schemas = document(app)["components"]["schemas"]
    for path, kind in ((COMPLETIONS, "CompletionAnswer"), (CHAT, "ChatAnswer")):
        body = {"prompt": "say hi"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "say hi"}]}
        whole = ok(app, path, **body, return_token_ids=True)
        assert set(schemas[kind]["required"]) <= set(whole) <= set(schemas[kind]["properties"])
        choice = schemas[schemas[kind]["properties"]["choices"]["items"]["$ref"].rsplit("/", 1)[1]]
        assert set(choice["required"]) <= set(whole["choices"][0]) <= set(choice["properties"])


@pytest.mark.parametrize("n", [1, 2, 9, 10, 11, 99, 100, 101, 512, 4321, 49152])
def test_a_pattern_of_numbers_below_another(n):
    pattern = re.compile(f"^(?:{below(n)})$")
    assert [i for i in range(2 * n + 120) if pattern.match(str(i))] == list(range(n))
    assert not pattern.match("00") and not pattern.match("01") and not pattern.match("")
