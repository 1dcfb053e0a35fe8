"""The served OpenAPI document compared with the running weir: valid and invalid requests generated from it, and their responses.

Streams and sockets are excluded, because they do not end, and `wait` is shortened.
"""

import json
import re

import hypothesis
import pytest
import schemathesis
from openapi_spec_validator import OpenAPIV31SpecValidator
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from weir import Weir

EXAMPLES = 60


@pytest.fixture(scope="module")
def server():
    with Weir() as weir:
        yield weir
        assert weir.process.poll() is None and "panicked" not in weir.log, weir.log


@pytest.fixture(scope="module")
def api(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("api").exclude(path_regex=r"^/v1/(sse|ws)$")


@schemathesis.hook
def map_query(context, query):
    """Shortens valid waits; invalid ones stay invalid."""
    for name in ("wait", "timeout"):
        if query and re.fullmatch(r"\d+(ms|s|m|h|d)", str(query.get(name, ""))):
            query[name] = "20ms"
    return query


@schema.parametrize()
@hypothesis.settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_responses_conform_to_the_document(case):
    # 503 and 504, as for a missing provider, are documented responses, which the other checks compare with the document.
    excluded = [not_a_server_error] if case.path.startswith(("/v1/services/", "/v1/rpc")) else []
    if case.path == "/v1/events" and case.method != "DELETE":
        # OpenAPI cannot describe parameters that exclude or require each other, nor a body that may be anything with a parameter.
        excluded.append(positive_data_acceptance)
        # A resume position takes precedence over `after`, which is not validated then.
        wins = {"POST": {"channel"}, "GET": {"last_event_id", "lastEventId", "Last-Event-ID"}}.get(case.method, set())
        if wins & {*(case.query or {}), *(case.headers or {})}:
            excluded.append(negative_data_rejection)
    if case.path == "/v1/connections" and case.method == "DELETE":
        excluded.append(positive_data_acceptance)  # one of two parameters is required
    empty = ("", None, [], [""], [None], {})
    if any(value in empty for value in [*(case.query or {}).values(), *(case.headers or {}).values()]):
        excluded.append(negative_data_rejection)  # an empty parameter is as if absent
    if case.path == "/v1/events" and case.method == "DELETE" and "before" in (case.query or {}):
        excluded.append(positive_data_acceptance)  # the position must be one of the channel
    if case.path == "/v1/rpc":
        excluded.append(negative_data_rejection)  # JSON-RPC errors have status 200
    case.call_and_validate(timeout=30, excluded_checks=excluded)


def test_every_route_is_documented(api):
    """The routes of protocol.md are in the document."""
    documented = {(path, method) for path, item in api.raw_schema["paths"].items() for method in item}
    for path, methods in {
        "/v1/events": {"get", "post", "delete"}, "/v1/sse": {"get"}, "/v1/channels": {"get"}, "/v1/consumers": {"get"}, "/v1/consumers/{name}": {"get", "delete"},
        "/v1/consumers/{name}/commit": {"post"}, "/v1/consumers/{name}/seek": {"post"}, "/v1/services": {"get"}, "/v1/rpc": {"post"}, "/v1/presence": {"get"}, "/v1/connections": {"get", "delete"},
        "/health/live": {"get"}, "/health/ready": {"get"}, "/metrics": {"get"},
    }.items():  # fmt: skip
        for method in methods:
            shape = re.sub(r"\{\w+\}", "{}", path)
            assert any(re.sub(r"\{\w+\}", "{}", other) == shape and method == verb for other, verb in documented), f"{method} {path} is not documented"
    for path, item in api.raw_schema["paths"].items():
        for method, operation in item.items():
            if method not in ("get", "post", "put", "delete"):
                continue
            assert operation.get("summary") or operation.get("description"), f"{method} {path} has no description"
            assert operation["responses"], f"{method} {path}"


def test_the_document_is_valid(api):
    """Generators of clients reject a document with missing descriptions, repeated operation ids or undefined references."""
    document = api.raw_schema
    assert [str(error) for error in OpenAPIV31SpecValidator(document).iter_errors()] == []
    operations = [(path, method, operation) for path, item in document["paths"].items() for method, operation in item.items()]
    names = [operation["operationId"] for _, _, operation in operations]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[a-z][A-Za-z]+", name) for name in names), names
    for path, method, operation in operations:
        for status, response in operation["responses"].items():
            assert response["description"], f"{method} {path} {status}"
    defined = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert set(re.findall(r'"(#/components/[^"]+)"', json.dumps(document))) <= defined
