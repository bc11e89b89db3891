"""`POST /tasks/{task}/predict`: from a request's bytes to records for the task, and from what became of them to bytes.

The body is a record, a JSON object, or an array of records. An object goes on as it came; an array is cut between its
elements, which go on as they came too. So whatever a number looks like, the worker decodes what the client wrote.

Every request ends in one of the answers of ``STATUSES``. A place is taken before the body is read, and freed whatever
happens: an answer, the time that is over, or a client that hangs up, which ends the wait at once.

Where there is a token it has to come along. Where there is none only this machine can ask, and no page in a browser of
it that came from elsewhere: such a page cannot send ``application/json`` without our consent, and where its name was
made to stand for this machine, the header ``Host`` says that name.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import orjson
from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from streamproc.errors import RequestError, RequestsFullError
from streamproc.observe.metric_table import RequestOutcome
from streamproc.observe.prediction import Prediction, PredictRequest, TaskInput
from streamproc.observe.trace_context import TRACEPARENT, context_of, read
from streamproc.records import Cause, Failure, Trace
from streamproc.settings import PredictSettings

if TYPE_CHECKING:
    from streamproc.observe.tracing import Tracing

STATUSES = {
    200: "every record has a result",
    207: "some record of an array has no result; `errors` says which, and why",
    401: "the token is missing, or is not that of http.token or http.predict.token",
    403: "without http.token only this machine may ask, by the name localhost or by its address",
    404: "there is no such task",
    413: "the body is larger than http.predict.max_body_bytes, or has more records than http.predict.max_records",
    415: "the content type is not application/json",
    422: "the body is no record, or the record cannot be used",
    429: "too many requests wait; Retry-After says when to try again",
    500: "the model failed on the record",
    503: "the task takes no requests at the moment; Retry-After says when to try again",
    504: "there was no result in time",
}

_JSON = "application/json"
_GONE = 499
"""For the log: nobody reads the answer to a request whose client has hung up."""
_STATUS_OF = {Cause.INVALID: 422, Cause.REJECTED: 422, Cause.TIMEOUT: 504}
_SPACE = " \t\n\r"

Open = Callable[[str], PredictRequest]
"""Takes a place for a request to a task. Raises RequestError."""


_SCANNER = json.JSONDecoder(parse_int=len, parse_float=len)
"""Finds where a JSON value ends; numbers are the worker's business, however long they are."""


class _RefusedError(Exception):
    """The request ends here, with this status and sentence."""

    def __init__(self, status: int, detail: str, outcome: RequestOutcome = "invalid") -> None:
        self.status = status
        self.detail = detail
        self.outcome = outcome
        super().__init__(detail)


def predict_routes(
    open_: Open, settings: PredictSettings, tasks: Sequence[str], tokens: Sequence[str], tracing: Tracing | None = None
) -> APIRouter:
    """The route of every task; ``describe`` documents them one by one."""
    router = APIRouter()

    @router.post("/tasks/{task}/predict", include_in_schema=False)
    async def predict(task: str, request: Request) -> Response:
        refusal = _refusal(request, tokens)
        if refusal is not None:
            return _answer(*refusal, {"WWW-Authenticate": "Bearer"} if refusal[0] == 401 else {})
        if task not in tasks:
            return _answer(404, f"there is no task {task}; the tasks are: {', '.join(tasks)}")
        try:
            place = open_(task)
        except RequestError as error:
            return _unavailable(error)
        trace = None if tracing is None else tracing.request(_trace_headers(request))
        try:
            response = await _predict(request, place, settings, trace)
        finally:
            place.leave()
        if tracing is not None:
            if trace is not None:
                tracing.answered(trace, task, response.status_code)
            response.headers.update(_answer_headers(request, trace))
        return response

    return router


async def _predict(request: Request, place: PredictRequest, settings: PredictSettings, trace: Trace | None) -> Response:
    try:
        async with asyncio.timeout(settings.timeout_s):
            body = await _read(request, place, settings.max_body_bytes)
            values, is_list = cut(body, settings.max_records)
            answer = await _result(request, place.submit(values, trace))
    except TimeoutError:
        place.leave("timeout")
        return _answer(504, f"there was no result within http.predict.timeout_s ({settings.timeout_s:g} s)")
    except _RefusedError as error:
        place.leave(error.outcome)
        return _answer(error.status, error.detail)
    except RequestsFullError as error:
        place.leave("full")
        return _unavailable(error)
    except ClientDisconnect:
        answer = None
    if answer is None:
        return Response(status_code=_GONE)
    if isinstance(answer, RequestError):
        return _unavailable(answer)
    return _results(answer) if is_list else _result_alone(answer)


async def _read(request: Request, place: PredictRequest, limit: int) -> bytes:
    """The body, whose bytes count from the moment they are here."""
    announced = request.headers.get("content-length", "")
    too_large = _RefusedError(413, f"the body has more than {limit} bytes, which is http.predict.max_body_bytes")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large
        place.hold(len(part))
        parts.append(part)
    return b"".join(parts)


async def _result(
    request: Request, answer: asyncio.Future[Prediction | RequestError]
) -> Prediction | RequestError | None:
    """The answer, or None once the client has hung up: after the body nothing else comes from it."""
    gone = asyncio.ensure_future(request.receive())
    try:
        waiting: set[asyncio.Future[Any]] = {answer, gone}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
    return answer.result() if answer.done() else None


def cut(body: bytes, max_records: int) -> tuple[list[bytes], bool]:
    """The bytes of each record of a body, and whether they came as an array. Raises _RefusedError."""
    start = body[:1].strip() or body.lstrip()[:1]
    if start == b"{":
        return [body], False
    if start != b"[":
        raise _RefusedError(422, "send a record, a JSON object, or an array of records")
    try:
        values = [value.encode() for value in _elements(body.decode(), max_records)]
    except UnicodeDecodeError as error:
        raise _RefusedError(422, f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    if not values:
        raise _RefusedError(422, "the array has no record")
    return values, True


def _elements(text: str, max_records: int) -> list[str]:
    """The texts of the elements of an array."""
    found: list[str] = []
    at = _skip(text, text.index("[") + 1)
    if text[at : at + 1] == "]":
        after = at + 1
    else:
        while True:
            start = at
            try:
                _, at = _SCANNER.raw_decode(text, start)
            except (ValueError, RecursionError) as error:
                why = "nested too deeply" if isinstance(error, RecursionError) else "no JSON"
                raise _RefusedError(422, f"element {len(found)} of the array is {why}") from error
            if len(found) == max_records:
                raise _RefusedError(413, f"there are more than {max_records} records, http.predict.max_records")
            found.append(text[start:at])
            at = _skip(text, at)
            if text[at : at + 1] != ",":
                break
            at = _skip(text, at + 1)
        if text[at : at + 1] != "]":
            raise _RefusedError(422, f"the array does not go on, or end, after element {len(found) - 1}")
        after = at + 1
    if _skip(text, after) < len(text):
        raise _RefusedError(422, "something comes after the array")
    return found


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


# -- traces


def _trace_headers(request: Request) -> list[tuple[str, bytes | None]]:
    return [(name.decode("latin-1"), value) for name, value in request.headers.raw if name.startswith(b"trace")]


def _answer_headers(request: Request, trace: Trace | None) -> dict[str, str]:
    """The `traceparent` of an answer: the request's own span, or, where that is not sampled, what came."""
    context = read(_trace_headers(request)) if trace is None else context_of(trace)
    return {} if context is None else {TRACEPARENT: context.traceparent}


# -- who asks


def has_token(request: Request, token: str) -> bool:
    """Whether this token came along."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())


def _refusal(request: Request, tokens: Sequence[str]) -> tuple[int, str] | None:
    """Why a request is not even looked at: status and sentence."""
    if tokens:
        if not any(has_token(request, token) for token in tokens):
            return 401, "send the token of http.token, or of http.predict.token, as `Authorization: Bearer …`"
    elif not _is_this_machine(request.headers.get("host", "")):
        return 403, STATUSES[403]
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != _JSON:
        return 415, "send the header `Content-Type: application/json`"
    return None


def _is_this_machine(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


# -- answers


def _answer(status: int, detail: str, headers: Mapping[str, str] | None = None, **more: Any) -> Response:
    return Response(orjson.dumps({"detail": detail, **more}), status, headers, _JSON)


def _unavailable(error: RequestError) -> Response:
    status = 429 if isinstance(error, RequestsFullError) else 503
    return _answer(status, str(error), {"Retry-After": str(error.retry_after_s or 1)})


def _result_alone(prediction: Prediction) -> Response:
    (value,) = prediction.values
    if isinstance(value, Failure):
        return _answer(_STATUS_OF.get(value.cause, 500), value.message, error=_facts(value))
    metrics = prediction.metrics[0]
    content = {"result": orjson.Fragment(value), **_time(prediction), "metrics": orjson.Fragment(metrics)}
    return Response(orjson.dumps(content), media_type=_JSON)


def _results(prediction: Prediction) -> Response:
    failed = [(index, it) for index, it in enumerate(prediction.values) if isinstance(it, Failure)]
    content = {
        "result": [None if isinstance(it, Failure) else orjson.Fragment(it) for it in prediction.values],
        "errors": [{"index": index, **_facts(it)} for index, it in failed],
        **_time(prediction),
        "metrics": [orjson.Fragment(it) for it in prediction.metrics],
    }
    return Response(orjson.dumps(content), 207 if failed else 200, media_type=_JSON)


def _facts(failure: Failure) -> dict[str, str]:
    return {"cause": failure.cause, "stage": failure.stage, "kind": failure.kind, "message": failure.message}


def _time(prediction: Prediction) -> dict[str, float]:
    return {"inference_time": round(prediction.inference_ms, 5)}


# -- documentation

_METRICS: dict[str, Any] = {
    "type": "object",
    "description": "The execution metrics of the batch, in milliseconds.",
    "example": {
        "batch_size": 1,
        "execution_times": {"preprocess": 0.01, "transform_inputs": 0.02, "execute": 4.1, "transform_outputs": 0.01},
        "total_execution_time": 4.14,
        "queue_time": 20.3,
    },
}
_TIME = {"type": "number", "description": "Milliseconds from the request's first byte until its results were there."}
_FACTS = {name: {"type": "string"} for name in ("cause", "stage", "kind", "message")}
SCHEMAS: dict[str, Any] = {
    "Prediction": {
        "type": "object",
        "required": ["result", "inference_time", "metrics"],
        "properties": {
            "result": {"type": "object", "description": "The backend's output."},
            "inference_time": _TIME,
            "metrics": _METRICS,
        },
    },
    "Predictions": {
        "type": "object",
        "required": ["result", "errors", "inference_time", "metrics"],
        "properties": {
            "result": {
                "type": "array",
                "items": {"type": ["object", "null"]},
                "description": "The backend's output for each record, in their order; null where it failed.",
            },
            "errors": {
                "type": "array",
                "items": {"type": "object", "properties": {"index": {"type": "integer"}, **_FACTS}},
                "description": "Which records failed, and why.",
            },
            "inference_time": _TIME,
            "metrics": {"type": "array", "items": _METRICS, "description": "Of each batch that the records were in."},
        },
    },
    "PredictRefusal": {
        "type": "object",
        "required": ["detail"],
        "properties": {"detail": {"type": "string"}, "error": {"type": "object", "properties": _FACTS}},
    },
}


def describe(document: dict[str, Any], inputs: Mapping[str, TaskInput], *, guarded: bool) -> None:
    """Add an operation for every task, with the schema and samples of its own records, to an OpenAPI document."""
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas |= SCHEMAS
    if guarded:
        components.setdefault("securitySchemes", {})["token"] = {"type": "http", "scheme": "bearer"}
    for task, it in inputs.items():
        name = f"{task}.record"
        schemas[name] = embedded(it.schema or {"type": "object"}, f"#/components/schemas/{name}")
        if it.result is not None:
            schemas |= _answers_of(task, it.result)
        document["paths"][f"/tasks/{task}/predict"] = {"post": _operation(task, name, it, guarded=guarded)}


def _answers_of(task: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """The schemas of a task's answers, whose results the backend describes."""
    name = f"{task}.result"
    one = {"$ref": f"#/components/schemas/{name}"}
    schemas: dict[str, Any] = {name: embedded(result, one["$ref"])}
    for answer, described in (
        ("Prediction", one),
        (
            "Predictions",
            {**SCHEMAS["Predictions"]["properties"]["result"], "items": {"anyOf": [one, {"type": "null"}]}},
        ),
    ):
        properties = {**SCHEMAS[answer]["properties"], "result": described}
        schemas[f"{task}.{answer}"] = {**SCHEMAS[answer], "properties": properties}
    return schemas


def _operation(task: str, record: str, it: TaskInput, *, guarded: bool) -> dict[str, Any]:
    one = {"$ref": f"#/components/schemas/{record}"}
    content: dict[str, Any] = {"schema": {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}}
    if it.samples:
        content["examples"] = {
            "record": {"summary": "one record", "value": it.samples[0]},
            "records": {"summary": "an array of records", "value": list(it.samples[:2])},
        }
    its = "" if it.result is None else f"{task}."
    answers = {200: [f"{its}Prediction", f"{its}Predictions"], 207: [f"{its}Predictions"]}
    operation = {
        "tags": ["predict"],
        "summary": f"What the model of task {task} says to a record, or to each of several",
        "description": it.description,
        "operationId": f"predict_{task}",
        "requestBody": {"required": True, "content": {_JSON: content}},
        "responses": {
            str(status): {
                "description": f"{HTTPStatus(status).phrase}: {meaning}",
                "content": {
                    _JSON: {
                        "schema": {
                            "anyOf": [
                                {"$ref": f"#/components/schemas/{it}"} for it in answers.get(status, ["PredictRefusal"])
                            ]
                        }
                    }
                },
            }
            for status, meaning in STATUSES.items()
            if status != 404
        },
    }
    return {**operation, "security": [{"token": []}]} if guarded else operation


def embedded(schema: Any, place: str) -> Any:
    """A JSON Schema as a part of a document: what it refers to in itself is there now."""
    if isinstance(schema, dict):
        return {
            key: place + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else embedded(value, place)
            for key, value in schema.items()
            if key not in ("$schema", "$id")
        }
    return [embedded(it, place) for it in schema] if isinstance(schema, list) else schema
