"""The dashboard's page as it is served; in a browser it is looked at by tests/integration and tests/acceptance."""

from __future__ import annotations

import asyncio
import hashlib
import re
from base64 import b64encode
from html.parser import HTMLParser

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from streamproc.observe.dashboard import dashboard_routes
from streamproc.observe.status import (
    BatchTotals,
    CircuitStatus,
    CostStatus,
    FailureStatus,
    LastBatch,
    MeasurerStatus,
    Observed,
    PartitionStatus,
    ProcessorStatus,
    RecordCounts,
    ReloadStatus,
    RequestStatus,
    TargetStatus,
    TaskStatus,
    WindowStatus,
    WorkerStatus,
)

READS: dict[str, type[BaseModel]] = {
    "status": ProcessorStatus,
    "task": TaskStatus,
    "partition": PartitionStatus,
    "worker": WorkerStatus,
    "measurer": MeasurerStatus,
    "circuit": CircuitStatus,
    "counts": RecordCounts,
    "totals": BatchTotals,
    "observed": Observed,
    "failure": FailureStatus,
    "collecting": WindowStatus,
    "last": LastBatch,
    "target": TargetStatus,
    "requests": RequestStatus,
    "cost": CostStatus,
    "reload": ReloadStatus,
}
"""What the script calls the parts of a status."""


class Elements(HTMLParser):
    """The elements of a page, with their attributes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def all(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag in names]


def ask(method: str = "GET", *, token_set: bool = False) -> httpx.Response:
    app = FastAPI()
    app.include_router(dashboard_routes(token_set=token_set))

    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://sidecar") as client:
            return await client.request(method, "/")

    return asyncio.run(go())


@pytest.fixture(scope="module")
def page() -> str:
    return ask().text


@pytest.fixture(scope="module")
def script(page: str) -> str:
    return content(page, "script")


def content(page: str, element: str) -> str:
    (found,) = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
    return str(found)


def policy(answer: httpx.Response) -> dict[str, str]:
    parts = [it.strip().partition(" ") for it in answer.headers["content-security-policy"].split(";")]
    return {name: value for name, _, value in parts}


def test_the_page_is_served_and_can_be_asked_for_without_its_body() -> None:
    answer = ask()
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.text.startswith("<!doctype html>")
    head = ask("HEAD")
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(answer.content)))


@pytest.mark.parametrize("token_set", [False, True])
def test_the_policy_allows_the_pages_own_style_and_script_by_their_hashes_and_nothing_else(token_set: bool) -> None:
    answer = ask(token_set=token_set)
    told = policy(answer)
    for element in ("script", "style"):
        digest = hashlib.sha256(content(answer.text, element).encode()).digest()
        assert told.pop(f"{element}-src") == f"'sha256-{b64encode(digest).decode()}'"
    assert told == {
        "default-src": "'none'",
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_nothing_on_the_page_comes_from_elsewhere(page: str) -> None:
    elements = Elements(page)
    named = [
        value
        for _, attributes in elements.found
        for name, value in attributes.items()
        if name in {"href", "src", "srcset", "action", "formaction", "data", "poster", "background", "ping"}
    ]
    assert set(named) == {"data:,", "status", "health", "metrics", "docs", "redoc"}, (
        "of this sidecar, whatever its prefix"
    )
    assert re.findall(r"https?:|wss?:|url\(|@import|[\"'`]//", page) == []
    assert not elements.all("img", "iframe", "object", "embed", "base", "script[src]")
    assert [name for _, it in elements.found for name in it if name.startswith("on") or name == "style"] == []


def test_the_script_makes_no_markup_of_text(script: str) -> None:
    sinks = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|eval\(|Function\("
    )
    assert re.findall(sinks, script) == []
    assert "localStorage" not in script, "the token does not outlive its tab"
    assert "document.cookie" not in script


def test_every_field_that_the_script_reads_is_in_the_status(script: str) -> None:
    for name, model in READS.items():
        fields = {field.alias or key for key, field in model.model_fields.items()}
        read = set(re.findall(rf"(?<![\w.\"'-]){name}\.([a-z_]+)", script))
        assert read, f"nothing of {model.__name__} is read: has `{name}` another name now?"
        assert read <= fields, f"{model.__name__} has no {sorted(read - fields)}"


def test_every_part_of_a_task_and_of_its_circuit_is_shown(script: str) -> None:
    shown = {name: set(re.findall(rf"(?<![\w.\"'-]){name}\.([a-z_]+)", script)) for name in READS}
    for name, unread in {
        "status": set[str](),
        "reload": set[str](),
        "cost": set[str](),
        "measurer": set[str](),
        "task": set[str](),
        "circuit": set[str](),
        "counts": set[str](),
        "totals": set[str](),
        "failure": set[str](),
        "last": set[str](),
        "target": set[str](),
        "requests": set[str](),
        "partition": {"epoch", "position"},
        "worker": set[str](),
    }.items():
        fields = {field.alias or key for key, field in READS[name].model_fields.items()}
        assert fields - shown[name] == unread, name


def test_every_element_that_the_script_asks_for_is_on_the_page(page: str, script: str) -> None:
    elements = Elements(page).found
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"\bby\(\"([\w-]+)\"\)", script)) <= set(ids)
    charts = set(re.findall(r"\bchart\(\"([\w-]+)\"", script))
    assert charts
    assert charts | {f"{it}-text" for it in charts} <= set(ids)
    parts = {attributes["data-part"] for _, attributes in elements if "data-part" in attributes}
    asked = set(re.findall(r"\bpart\[\"([\w-]+)\"\]", script)) | set(re.findall(r"\bpart\.(\w+)", script))
    assert asked == parts


def test_a_screen_reader_finds_its_way(page: str) -> None:
    elements = Elements(page)
    assert elements.all("html")[0]["lang"] == "en"
    for landmark in ("header", "main", "nav", "h1"):
        assert len(elements.all(landmark)) == 1, landmark
    ids = {it["id"] for _, it in elements.found if "id" in it}
    for attributes in elements.all("section"):
        assert attributes.get("aria-labelledby") in ids or attributes.get("class") == "task", "named by its script"
    headers = [it for it in elements.all("th") if it.get("scope") != "col"]
    assert headers == []
    assert all(it.get("role") == "img" and it.get("aria-labelledby") in ids for it in elements.all("svg"))
    live = [it for _, it in elements.found if it.get("aria-live")]
    assert [it["aria-live"] for it in live] == ["polite"]
    assert {it["for"] for it in elements.all("label")} == {it["id"] for it in elements.all("input")}
    (viewport,) = [it["content"] for it in elements.all("meta") if it.get("name") == "viewport"]
    assert viewport == "width=device-width, initial-scale=1", "whoever needs to may zoom"


def test_the_page_knows_whether_there_is_a_token() -> None:
    assert Elements(ask(token_set=True).text).all("html")[0]["data-token"] == "set"
    assert Elements(ask(token_set=False).text).all("html")[0]["data-token"] == "none"
