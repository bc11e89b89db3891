"""The HTML report: whole, self-contained, and nothing in a topic can become a part of it."""

from __future__ import annotations

from datetime import UTC, datetime
from html.parser import HTMLParser
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from streamproc.broker.memory_log import MemoryRecord
from streamproc.replay.diff import BASELINE, CANDIDATE, Comparison, Limit
from streamproc.replay.report import html_report, sentence
from streamproc.replay.values import Rules
from tests.unit.replay.test_diff import batch, dead, result

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
VOID = {"meta", "br"}
KNOWN = {
    *("html", "head", "meta", "title", "style", "body", "p", "h1", "h2", "h3", "span", "div", "code", "pre"),
    *("table", "tr", "th", "td", "details", "summary", "svg", "rect", "path", "circle", "text"),
}


class Page(HTMLParser):
    """Parses a page, and sees that every element is closed where it should be."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def page_of(
    baseline: list[MemoryRecord], candidate: list[MemoryRecord], limit: str = "0", **options: Any
) -> tuple[str, Page]:
    with Comparison(Rules(), **options) as comparison:
        comparison.add_all(BASELINE, baseline)
        comparison.add_all(CANDIDATE, candidate)
        comparison.finish()
        page = html_report(comparison, Limit.parse(limit), now=NOW, notes=["Floats are close within <1>."])
    return page, Page(page)


def assert_self_contained(page: Page) -> None:
    assert page.tags <= KNOWN
    for name, value in page.attributes:
        assert name not in ("src", "href", "action", "srcset", "data", "style")
        assert not name.startswith("on")
        assert "//" not in (value or "")


def test_the_report_shows_verdicts_fields_examples_and_metrics() -> None:
    before = [*batch(8, 4.0, 0, 2_000), *batch(1, 2.0, 8, 3_000), result(9, {"label": "a", "s": 0.5}), result(10, {})]
    after = [*batch(9, 8.0, 0, 4_000), result(9, {"label": "b", "s": 0.75}), dead(10, "timeout", "too slow")]
    text, page = page_of(before, after, names=("golden.jsonl", "results@run"))
    assert_self_contained(page)
    for part in (
        "golden.jsonl",
        "results@run",
        "2 of 11 records differ (18.182%), beyond the limit of 0",
        "execute p95",
    ):
        assert part in page.text
    for part in ("texts/0/9", "texts/0/10", '"a"', '"b"', "0.75", "too slow", "Floats are close within <1>."):
        assert part in page.text
    assert "2026-01-31 12:00 UTC" in page.text
    assert text.count('<svg class="chart"') == 8  # two of the field; latency, two steps, total, queue, batch size


def test_a_report_without_a_difference_says_so_and_is_whole() -> None:
    _, page = page_of([result(0, {})], [result(0, {})])
    assert "0 of 1 records differ, within the limit of 0" in page.text
    assert "Examples" not in page.text
    assert_self_contained(page)


texts = st.text(max_size=12) | st.sampled_from(
    ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", '"><b>', "'", "&lt;", "\x1b[31m", "\u202e"]
)


@given(texts, texts, texts, texts, st.booleans())
def test_nothing_in_a_topic_becomes_a_part_of_the_page(
    field: str, value: str, key: str, name: str, is_dead: bool
) -> None:
    plain = {"x": [1.5], "a": "b", "c": 1}
    before = [result(0, {field: value, **plain}, key=key.encode(errors="replace"), task=name)]
    after = [result(0, {field: [value], "x": [2.5], "a": field, "c": {}}, task=name)]
    if is_dead:
        after = [dead(0, "exception", value)]
    text, page = page_of(before, after)
    assert_self_contained(page)
    assert [it for it in text if not it.isprintable() and it != "\n"] == []


def test_what_cannot_be_seen_is_escaped() -> None:
    _, page = page_of([result(0, {"a\u202e": "x\u200by"})], [result(0, {"a\u202e": "z"})])
    assert '["a\\u202e"]' in page.text
    assert "x\\u200by" in page.text


def test_the_answer_is_a_sentence() -> None:
    with Comparison(Rules()) as comparison:
        comparison.add_all(BASELINE, [result(it, it) for it in range(200)])
        comparison.add_all(CANDIDATE, [result(it, max(it, 1)) for it in range(200)])
        assert sentence(comparison, Limit.parse("1%")) == "1 of 200 records differ (0.500%), within the limit of 1 %"
