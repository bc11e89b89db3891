"""Predictions over HTTP, without a processor: bytes to records, who may ask, what is answered, what is documented."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx
import jsonschema_rs
import pytest
from fastapi import FastAPI
from hypothesis import example, given
from hypothesis import strategies as st

from streamproc.errors import RequestError, RequestsFullError, TaskUnavailableError
from streamproc.observe.http import create_app
from streamproc.observe.metric_table import RequestOutcome
from streamproc.observe.metrics import Metrics
from streamproc.observe.predict import STATUSES, cut, embedded
from streamproc.observe.prediction import Prediction, TaskInput
from streamproc.records import Cause, Failure, Trace
from streamproc.settings import HttpSettings
from tests.unit.observe.test_http import StubView

PATH = "/tasks/text/predict"
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$id": "https://example.org/text",
    "type": "object",
    "required": ["text"],
    "properties": {"text": {"$ref": "#/$defs/words"}, "next": {"$ref": "#"}},
    "$defs": {"words": {"type": "string", "minLength": 1}},
}
INPUTS = {"text": TaskInput(SCHEMA, [{"text": "a"}, {"text": "b"}], "Texts of people."), "plain": TaskInput()}
METRICS = b'{"batch_size":2}'


class Place:
    """A request's place in a processor that answers as a test says."""

    def __init__(self, answer: Callable[[Sequence[bytes]], Prediction | RequestError]) -> None:
        self._answer = answer
        self.held = 0
        self.ended: list[RequestOutcome] = []

    def hold(self, size_bytes: int) -> None:
        self.held += size_bytes

    def submit(self, values: Sequence[bytes], trace: Trace | None = None) -> asyncio.Future[Prediction | RequestError]:
        self.trace = trace
        done: asyncio.Future[Prediction | RequestError] = asyncio.get_running_loop().create_future()
        done.set_result(self._answer(values))
        return done

    def leave(self, outcome: RequestOutcome = "left") -> None:
        self.ended.append(outcome)


class Predicting(StubView):
    """A processor that echoes, or fails as told."""

    def __init__(self, failures: Mapping[int, Failure] | None = None, error: RequestError | None = None) -> None:
        super().__init__()
        self.failures = failures or {}
        self.error = error
        self.places: list[Place] = []

    def request(self, task: str) -> Place:
        assert task in INPUTS
        if self.error is not None:
            raise self.error
        self.places.append(Place(self._predict))
        return self.places[-1]

    def _predict(self, values: Sequence[bytes]) -> Prediction:
        return Prediction([self.failures.get(index, value) for index, value in enumerate(values)], [METRICS], 1.25)


def an_app(view: Predicting | None = None, *, token: str | None = None, predict_token: str | None = None) -> FastAPI:
    return create_app(
        view or Predicting(),
        Metrics(),
        HttpSettings(),
        inputs=lambda: INPUTS,
        token=token,
        predict_token=predict_token,
    )


def post(
    app: FastAPI, content: bytes, *, path: str = PATH, host: str = "localhost:8080", **headers: str
) -> httpx.Response:
    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=f"http://{host}") as client:
            return await client.post(path, content=content, headers={"content-type": "application/json", **headers})

    return asyncio.run(go())


def get(app: FastAPI, path: str) -> httpx.Response:
    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.get(path)

    return asyncio.run(go())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
space = st.text(alphabet=" \t\r\n", max_size=3)


@given(st.lists(json_values, min_size=1, max_size=6), st.data())
def test_an_array_is_cut_into_the_bytes_of_its_elements(values: list[Any], data: st.DataObject) -> None:
    texts = [json.dumps(value, ensure_ascii=data.draw(st.booleans())) for value in values]
    inside = ",".join(data.draw(space) + text + data.draw(space) for text in texts)
    body = f"{data.draw(space)}[{inside}]{data.draw(space)}".encode("utf-8", "surrogatepass")
    try:
        body.decode()
    except UnicodeDecodeError:
        return
    assert cut(body, 6) == ([text.encode() for text in texts], True)


@pytest.mark.parametrize("number", ["123456789012345678901234567890", "1" * 5_000, "1e999", "0.10", "-0", "1E+2"])
def test_a_number_stays_as_the_client_wrote_it(number: str) -> None:
    assert cut(f'[{{"n": {number}}}]'.encode(), 1) == ([f'{{"n": {number}}}'.encode()], True)


def test_a_record_alone_goes_on_as_it_came() -> None:
    assert cut(b'\n {"a": [1}', 1) == ([b'\n {"a": [1}'], False)


@given(st.binary(max_size=30))
@example(b"[" * 100_000)
@example(b"[1,]")
@example(b"[1 2]")
@example(b"[1] x")
@example(b'["\xff"]')
def test_whatever_the_body_is_it_is_cut_or_refused(body: bytes) -> None:
    answer = post(an_app(), body)
    assert answer.status_code in (200, 422)
    if answer.status_code == 422:
        assert answer.json()["detail"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "send a record"),
        (b"3", "send a record"),
        (b'"text"', "send a record"),
        (b"[]", "no record"),
        (b"[1,]", "element 1 of the array is no JSON"),
        (b"[" + b"[" * 50_000, "element 0 of the array is nested too deeply"),
        (b"[{} {}]", "does not go on, or end, after element 0"),
        (b"[{}", "does not go on, or end, after element 0"),
        (b"[{}]]", "something comes after the array"),
        (b'["\xff"]', "not UTF-8"),
    ],
)
def test_a_body_that_is_no_record_is_refused_with_the_reason_and_its_place_is_free(body: bytes, says: str) -> None:
    view = Predicting()
    answer = post(an_app(view), body)
    assert answer.status_code == 422
    assert says in answer.json()["detail"]
    assert view.places[0].ended[0] == "invalid"


def test_one_record_gets_its_result_and_an_array_one_for_each() -> None:
    view = Predicting()
    one = post(an_app(view), b'{"text": "a"}')
    assert (one.status_code, one.json()) == (
        200,
        {"result": {"text": "a"}, "inference_time": 1.25, "metrics": {"batch_size": 2}},
    )
    assert view.places[0].held == len(b'{"text": "a"}')
    several = post(an_app(view), b'[{"text": "a"}, {"text": "b"}]')
    assert several.json() == {
        "result": [{"text": "a"}, {"text": "b"}],
        "errors": [],
        "inference_time": 1.25,
        "metrics": [{"batch_size": 2}],
    }


@pytest.mark.parametrize(
    ("cause", "status"),
    [
        (Cause.INVALID, 422),
        (Cause.REJECTED, 422),
        (Cause.EXCEPTION, 500),
        (Cause.OUTPUT, 500),
        (Cause.CRASH, 500),
        (Cause.OOM, 500),
        (Cause.TIMEOUT, 504),
    ],
)
def test_a_record_that_fails_alone_is_the_answers_status_and_in_an_array_an_error_of_its_own(
    cause: Cause, status: int
) -> None:
    failure = Failure(cause, "execute", "ValueError", "it is broken", traceback="secret.py:1")
    facts = {"cause": cause, "stage": "execute", "kind": "ValueError", "message": "it is broken"}
    alone = post(an_app(Predicting({0: failure})), b"{}")
    assert (alone.status_code, alone.json()) == (status, {"detail": "it is broken", "error": facts})
    among = post(an_app(Predicting({1: failure})), b"[{}, {}]")
    assert among.status_code == 207
    assert among.json()["result"] == [{}, None]
    assert among.json()["errors"] == [{"index": 1, **facts}]


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (RequestsFullError("full", retry_after_s=1), 429, "1"),
        (TaskUnavailableError("the circuit is open", retry_after_s=42), 503, "42"),
    ],
)
def test_a_task_that_takes_no_request_says_when_to_come_again(
    error: RequestError, status: int, retry_after: str
) -> None:
    answer = post(an_app(Predicting(error=error)), b"{}")
    assert (answer.status_code, answer.json()) == (status, {"detail": str(error)})
    assert answer.headers["retry-after"] == retry_after


def test_an_unknown_task_is_404_with_the_tasks_there_are() -> None:
    answer = post(an_app(), b"{}", path="/tasks/txet/predict")
    assert answer.status_code == 404
    assert answer.json()["detail"] == "there is no task txet; the tasks are: text, plain"


def test_only_json_is_taken() -> None:
    assert post(an_app(), b"{}", **{"content-type": "text/plain"}).status_code == 415


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost:8080", True),
        ("127.0.0.1:8080", True),
        ("127.8.8.8", True),
        ("[::1]:8080", True),
        ("evil.example:8080", False),
        ("10.0.0.7", False),
        ("localhost.evil.example", False),
    ],
)
def test_without_a_token_a_page_whose_name_stands_for_this_machine_gets_nothing(host: str, allowed: bool) -> None:
    assert post(an_app(), b"{}", host=host).status_code == (200 if allowed else 403)


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        ("Bearer hunter2", 200),
        ("bearer  hunter2 ", 200),
        ("Bearer hunter", 401),
        ("Bearer hunter22", 401),
        ("Basic hunter2", 401),
        ("hunter2", 401),
        ("", 401),
    ],
)
def test_with_a_token_only_who_sends_it_is_answered_whatever_the_host(authorization: str, status: int) -> None:
    answer = post(an_app(token="hunter2"), b"{}", host="10.0.0.7", authorization=authorization)  # noqa: S106 - a test
    assert answer.status_code == status
    assert "hunter2" not in answer.text
    assert (answer.headers.get("www-authenticate") == "Bearer") is (status == 401)


def test_the_token_for_predictions_is_good_for_those_and_for_no_change() -> None:
    for_all, for_predictions = "Bearer hunter2", "Bearer hunter3"
    both = an_app(token="hunter2", predict_token="hunter3")  # noqa: S106 - a test
    circuit = "/tasks/text/circuit/open"
    for authorization, predicts, changes in ((for_all, 200, 200), (for_predictions, 200, 401), ("Bearer x", 401, 401)):
        asked = {"host": "10.0.0.7", "authorization": authorization}
        assert post(both, b"{}", **asked).status_code == predicts
        assert post(both, b"", path=circuit, **asked).status_code == changes
    alone = an_app(predict_token="hunter3")  # noqa: S106 - a test
    assert post(alone, b"{}", host="10.0.0.7", authorization=for_predictions).status_code == 200
    assert post(alone, b"{}", host="10.0.0.7").status_code == 401
    assert get(alone, "/openapi.json").json()["paths"][PATH]["post"]["security"] == [{"token": []}]


def test_nothing_is_served_where_predictions_are_off() -> None:
    app = create_app(Predicting(), Metrics(), HttpSettings())
    assert post(app, b"{}").status_code == 404
    assert PATH not in get(app, "/openapi.json").json()["paths"]


# -- documentation


def test_each_task_is_documented_with_the_schema_and_samples_of_its_own_records() -> None:
    document = get(an_app(token="hunter2"), "/openapi.json").json()  # noqa: S106 - a test
    operation = document["paths"][PATH]["post"]
    assert operation["operationId"] == "predict_text"
    assert operation["description"] == "Texts of people."
    assert operation["security"] == [{"token": []}]
    assert document["components"]["securitySchemes"]["token"] == {"type": "http", "scheme": "bearer"}
    assert set(operation["responses"]) == {str(status) for status in STATUSES} - {"404"}
    content = operation["requestBody"]["content"]["application/json"]
    assert [it["value"] for it in content["examples"].values()] == [{"text": "a"}, [{"text": "a"}, {"text": "b"}]]
    # The schema as part of the document says what the file says.
    request = jsonschema_rs.validator_for({**content["schema"], "components": document["components"]})
    for good in ({"text": "a"}, [{"text": "a", "next": {"text": "b"}}]):
        assert request.is_valid(good)
    for bad in ({}, {"text": ""}, [], [{"text": "a", "next": {}}], 3):
        assert not request.is_valid(bad)
    assert "examples" not in document["paths"]["/tasks/plain/predict"]["post"]["requestBody"]["content"]


def test_results_are_documented_as_the_backend_describes_them_and_anew_when_that_changes() -> None:
    result = {"$ref": "#/$defs/mood", "$defs": {"mood": {"type": "object", "required": ["label"]}}}
    known = {"text": TaskInput()}
    app = create_app(Predicting(), Metrics(), HttpSettings(), inputs=lambda: known)
    assert "text.result" not in get(app, "/openapi.json").json()["components"]["schemas"]
    known = {"text": TaskInput(SCHEMA, result=result)}
    document = get(app, "/openapi.json").json()
    said = {"inference_time": 1.0, "metrics": {}}
    several = {"inference_time": 1.0, "metrics": [], "errors": []}
    answers = {
        status: jsonschema_rs.validator_for(
            {**it["content"]["application/json"]["schema"], "components": document["components"]}
        )
        for status, it in document["paths"][PATH]["post"]["responses"].items()
        if status in ("200", "207")
    }
    assert answers["200"].is_valid({"result": {"label": "good"}, **said})
    assert not answers["200"].is_valid({"result": {}, **said})
    assert answers["207"].is_valid({"result": [{"label": "good"}, None], **several})
    assert not answers["207"].is_valid({"result": [{}, None], **several})
    assert not answers["207"].is_valid({"result": {"label": "good"}, **said})
    assert get(app, "/openapi.json").json() == document


def test_references_within_a_schema_are_followed_in_the_document() -> None:
    assert embedded(SCHEMA, "#/x")["properties"] == {"text": {"$ref": "#/x/$defs/words"}, "next": {"$ref": "#/x"}}
    assert embedded({"$ref": "https://example.org/other"}, "#/x") == {"$ref": "https://example.org/other"}


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_a_page_loads_files_of_this_machine_only_and_its_policy_lets_it_load_no_other(path: str) -> None:
    app = an_app()
    page = get(app, path)
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert not [it for sources in policy.values() for it in sources.split() if "." in it or "*" in it]
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(loaded) >= 3
    assert "://" not in page.text
    for it in loaded:
        file = get(app, f"/{it}")
        assert file.status_code == 200
        assert len(file.content) > 50
    assert get(app, "/docs/files/../http.py").status_code == 404
    assert get(app, "/docs/files/nothing.js").status_code == 404
