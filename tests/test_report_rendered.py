"""The report of a small evaluated world, looked at in a browser at every width and in both colour schemes."""

import re
import shutil

import pytest
from browser import SCHEMES, WIDTHS, check_layout, executable, required, visit
from evaluate_world import settings, world  # noqa: F401 (a fixture)

from pipeline.evaluate import stage
from pipeline.layout import Layout
from pipeline.report.stage import report
from pipeline.report.status import up_to_date

FIGURES = ("results", "changes", "kinds", "training")
SECTIONS = ("results", "kinds", "gallery", "mistakes", "grounding", "training", "facts", "repeat")


@pytest.fixture(scope="module")
def cfg(world, tmp_path_factory):  # noqa: F811
    """Two arms with two seeds each, evaluated on their own copy of the small world."""
    root = tmp_path_factory.mktemp("rendered") / "world"
    shutil.copytree(world, root, ignore=shutil.ignore_patterns("eval", "report"))
    runs = Layout(settings(root)).runs
    for arm, other in (("sft", "lavender"), ("lavender", "sft")):
        shutil.copytree(runs / f"{other}-1", runs / f"{arm}-2")
    made = settings(root, "eval.limit=20", "report.words=6")
    stage.evaluate(made)
    return made


@pytest.fixture(scope="module")
def page(cfg):
    return report(cfg).page


def test_page_is_self_contained_and_described(page, cfg):
    text = page.read_text()
    assert not re.search(r'(?:src|href|srcset)="(?!data:|#)', text)
    assert not re.search(r"https?://|@import|url\((?!#)", re.sub(r'="data:[^"]*"', "", text))
    images = re.findall(r"<img [^>]*>", text)
    assert len(images) > 10
    assert all(re.search(r'alt="[^"]{10,}"', image) for image in images)
    assert "over seeds and examples, 2 seeds" in text
    for name in (*FIGURES, "gallery"):
        assert (page.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert up_to_date(cfg)
    assert report(cfg).written == 0


def test_facts_come_from_the_receipts(page):
    text = page.read_text()
    assert re.search(r"<dt>splits</dt><dd>train 4, val 6, test 10", text)
    assert re.search(r"<dt>data set</dt><dd>world, licence Apache-2.0</dd>", text)
    for run in ("sft-1", "sft-2", "lavender-1", "lavender-2"):
        assert re.search(rf'<th scope="row"><i[^>]*></i>{run}</th>', text)
        arm, seed = run.split("-")
        assert re.search(rf"make train DATA=world TEACHER=tiny MODEL=tiny ARM={arm} SEED={seed} ARGS=", text)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overflows_and_all_can_be_read(chromium, page, width, scheme):
    with visit(chromium, page.as_uri(), width, scheme) as tab:
        check_layout(tab)
        for section in SECTIONS:
            assert tab.locator(f"#{section} h2").is_visible()
        for figure in FIGURES:
            shown = [one for one in tab.locator(f"svg[aria-labelledby={figure}-text]").all() if one.is_visible()]
            assert len(shown) == 1, "each figure has one shape for this width"
            assert shown[0].bounding_box()["width"] > 0.7 * min(width, 480) - 40
            assert tab.locator(f"#{figure}-text").text_content().strip()
        cards = tab.locator("#cards > li")
        assert cards.count() == 6
        for image in cards.first.locator("img").all():
            assert image.evaluate("e => e.complete && e.naturalWidth > 50 && e.clientWidth > 40")
        paper = tab.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper)[:3])) > 600) == (scheme == "light")


def test_figures_follow_the_colour_scheme(chromium, page):
    ink = {}
    for scheme in SCHEMES:
        with visit(chromium, page.as_uri(), 1280, scheme) as tab:
            label = tab.locator("svg.wide[aria-labelledby=results-text] text", has_text="lavender").first
            ink[scheme] = label.evaluate("e => getComputedStyle(e).fill")
    assert ink["light"] != ink["dark"]


def test_tables_are_sorted_with_the_keyboard(chromium, page):
    with visit(chromium, page.as_uri()) as tab:
        table = tab.locator("#results table").first
        head = table.locator("thead th").nth(3)
        head.locator("button").focus()
        for state in ("descending", "ascending"):
            tab.keyboard.press("Enter")
            assert head.get_attribute("aria-sort") == state
            values = table.locator("tbody tr").evaluate_all("rows => rows.map(r => Number(r.cells[3].dataset.sort))")
            assert values == sorted(values, reverse=state == "descending")
            assert len(set(values)) > 1
        # the other tables are reached and left by Tab alone
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement !== document.body")


def test_gallery_is_ordered_with_the_keyboard(chromium, page):
    with visit(chromium, page.as_uri()) as tab:
        order, cards = tab.locator("#order"), tab.locator("#cards > li")
        gain = """([from, to]) => [...document.querySelectorAll("#cards > li")].map(e => JSON.parse(e.dataset.scores))
          .map(s => s[to] - s[from])"""
        misses = cards.evaluate_all("all => all.map(e => JSON.parse(e.dataset.misses).lavender)")
        assert misses == sorted(misses, reverse=True), "failures first"
        order.focus()
        tab.keyboard.press("ArrowDown")
        assert order.input_value() == "gain"
        found = tab.evaluate(gain, ["base", "lavender"])
        assert found == sorted(found, reverse=True)
        tab.locator("#before").focus()
        tab.keyboard.press("ArrowDown")
        assert tab.locator("#before").input_value() == "sft"
        found = tab.evaluate(gain, ["sft", "lavender"])
        assert found == sorted(found, reverse=True)
        points = int(cards.first.locator(".change").inner_text().split()[0].replace("−", "-"))
        assert points == pytest.approx(100 * found[0], abs=0.51)
        tab.locator("#kind").focus()
        tab.keyboard.press("ArrowDown")
        kind = tab.locator("#kind").input_value()
        assert {one.get_attribute("data-kind") for one in cards.all() if one.is_visible()} == {kind}
        assert re.fullmatch(r"\d of 6 words", tab.locator("#shown").inner_text())


def test_page_is_complete_without_scripts(chromium, page):
    with visit(chromium, page.as_uri(), java_script_enabled=False) as tab:
        assert tab.locator("#cards > li").count() == 6
        assert tab.locator("#cards > li .change").first.is_visible()
        assert tab.locator("#commands").inner_text().startswith("make train")


def test_in_ci_a_missing_browser_is_a_failure(monkeypatch):
    monkeypatch.setenv("CI", "true")
    assert required()
    assert executable(), "install chromium, as .ci/run does"
