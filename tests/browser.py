"""A headless Chromium for tests of rendered pages, and what every page must keep to.

Without a browser such tests are skipped on a developer's machine; in CI (`CI` in the environment) that is a failure.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator

import pytest

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
WIDTHS = (320, 768, 1280, 1920)
SCHEMES = ("light", "dark")

# What sticks out to the right, apart from what lies in a box that scrolls by itself.
OVERFLOW = """() => {
  const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll, pre, .skip, svg *")
    && e.getClientRects().length && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1);
  if (document.documentElement.scrollWidth > document.documentElement.clientWidth) wide.push(document.documentElement);
  return wide.map(e => `${e.tagName}.${e.className.baseVal ?? e.className}: ${e.getBoundingClientRect().right}`);
}"""
# Contrast of each text with what is painted behind it (WCAG 2: 4.5, large text 3).
CONTRAST = """() => {
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return [m[0], m[1], m[2], m[3] ?? 1]; };
  const part = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = rgb => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => sum + weight * part(rgb[i] / 255), 0);
  const behind = e => {
    for (let at = e; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour[3] > 0.99) return colour;
    }
    return [255, 255, 255, 1];
  };
  const poor = new Set();
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walk.nextNode());) {
    const e = node.parentElement, text = node.data.trim();
    if (!text || !e.checkVisibility() || e.closest("script, style, svg, .skip, option")) continue;
    const style = getComputedStyle(e), a = light(parse(style.color)), b = light(behind(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), size = parseFloat(style.fontSize);
    const enough = size >= 24 || (size >= 18.6 && style.fontWeight >= 700) ? 3 : 4.5;
    if (ratio < enough) poor.add(`${e.tagName}.${e.className} ${ratio.toFixed(2)}: ${text.slice(0, 30)}`);
  }
  return [...poor];
}"""
# Buttons, links, fields and boxes that scroll must say what they are; so must pictures.
NAMELESS = """() => {
  const told = "button, a[href], select, input, img, canvas, svg:not([aria-hidden=true]), [role=img], [tabindex='0']";
  const name = e => e.getAttribute("aria-label") || e.getAttribute("alt") || e.labels?.length || e.textContent.trim()
    || document.getElementById(e.getAttribute("aria-labelledby"))?.textContent;
  return [...document.querySelectorAll(told)].filter(e => e.checkVisibility() && !e.closest("[aria-hidden=true]")
    && !name(e)).map(e => e.outerHTML.slice(0, 80));
}"""


def executable() -> str | None:
    """The path of Chromium, if it is installed."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def required() -> bool:
    """Whether a missing browser is a failure."""
    return os.environ.get("CI", "").lower() in ("1", "true")


@pytest.fixture(scope="module")
def chromium():
    """A running browser, closed after the tests of a module."""
    path = executable()
    if path is None:
        missing = "no chromium: apt-get install chromium (as .ci/run does)"
        if required():
            pytest.fail(missing)
        pytest.skip(missing)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def visit(browser, url: str, width: int = 1280, scheme: str = "light", height: int = 900, **context) -> Iterator:
    """A page at ``url``; whatever it writes to the console as an error, or asks of another host, fails the test."""
    place = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **context)
    page = place.new_page()
    faults: list[str] = []
    page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("requestfailed", lambda request: faults.append(f"{request.url[:80]} failed"))
    page.goto(url, wait_until="load")
    yield page
    found = list(faults)  # closing cuts off what is still under way
    place.close()
    assert found == []


def check_layout(page) -> None:
    """Nothing overflows, every text can be read, everything that can be used has a name."""
    assert page.evaluate(OVERFLOW) == []
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate(NAMELESS) == []
