"""The local page: one example at a time over real shards, maps and students; loopback only."""

import base64
import http.client
import json
import re
import shutil
import threading
import urllib.error
import urllib.request
from http.server import ThreadingHTTPServer

import numpy as np
import pytest
from browser import SCHEMES, WIDTHS, check_layout, visit
from evaluate_world import settings, world  # noqa: F401 (a fixture)

from pipeline import receipts
from pipeline.archive import Archive
from pipeline.layout import Layout
from pipeline.mapstore import ExampleMaps
from pipeline.mapstore.write import write_shard
from pipeline.report.browse import HOST, NAMES, handler
from pipeline.report.library import Library, Texts


@pytest.fixture(scope="module")
def library(world, tmp_path_factory):  # noqa: F811
    """The small world, whose teacher points at the first row of cells for every word of the test split."""
    root = tmp_path_factory.mktemp("browse")
    shutil.copytree(world / "shards", root / "shards")
    cfg = settings(world, f"shards_dir={root}/shards")
    folder = Layout(cfg).maps_split_dir("test")
    folder.mkdir(parents=True)
    rows = []
    for one in Archive(Layout(cfg).examples_dir("test")):
        words = one.words()
        maps = np.zeros((len(words), 32, 32), np.uint8)
        maps[:, 0] = 255
        unit = np.tile(np.float32([0, 1]), (len(words), 1))
        rows.append(ExampleMaps(one.key, words, maps, unit, np.zeros(len(words), np.uint8)))
    write_shard(folder / "00000.zarr", rows)
    receipts.write(folder / "00000.json", stage="precompute", settings={}, files=[folder / "00000.zarr"])
    receipts.write(folder / "manifest.json", stage="precompute", settings={}, children=[folder / "00000.json"])
    return Library(cfg)


@pytest.fixture(scope="module")
def served(library):
    """The address of a server over it."""
    server = ThreadingHTTPServer((HOST, 0), handler(library))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://{HOST}:{server.server_port}"
    server.shutdown()
    server.server_close()


def fetch(url, **headers):
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
        return answer.read()


def get(url):
    return json.loads(fetch(url))


def test_about_and_example(served):
    about = get(f"{served}/about")
    assert about["splits"]["test"] == 10
    assert next(iter(about["splits"])) == "train"
    assert about["students"] == ["base", "sft-1", "lavender-1"]
    assert about["teachers"]["test"] == {"tiny": True}
    assert about["teachers"]["train"] == {"tiny": False}, "not stored: read when it is asked for"
    told = re.search(r'<script type="application/json" id="about">([^<]*)</script>', fetch(served + "/").decode())
    assert json.loads(told[1]) == about, "it comes with the page, in which no name can end the element"
    one = get(f"{served}/example?split=test&index=3")
    for turn, start, end in one["words"]:
        assert one["turns"][turn]["text"][start:end].strip()
    assert fetch(f"{served}/image?split=test&index=3").startswith(b"\x89PNG")


def test_maps_of_teacher_and_student(served):
    one = get(f"{served}/example?split=test&index=3")
    found = get(f"{served}/maps?split=test&index=3&kind=teacher&name=tiny")
    maps = np.frombuffer(base64.b64decode(found["maps"]), np.uint8).reshape(-1, 32, 32)
    assert found["words"] == one["words"]
    assert (maps[:, 0] == 255).all()
    assert not maps[:, 1:].any()
    found = get(f"{served}/maps?split=test&index=3&kind=student&name=sft-1")
    maps = np.frombuffer(base64.b64decode(found["maps"]), np.uint8).reshape(-1, 32, 32)
    answers = [word for word in one["words"] if one["turns"][word[0]]["role"] == "assistant"]
    assert found["words"] == answers
    assert (maps.max((1, 2)) == 255).all()


def test_a_teacher_reads_what_is_not_stored(served):
    one = get(f"{served}/example?split=train&index=1")
    found = get(f"{served}/maps?split=train&index=1&kind=teacher&name=tiny")
    maps = np.frombuffer(base64.b64decode(found["maps"]), np.uint8).reshape(-1, 32, 32)
    assert sorted(found["words"]) == sorted(one["words"])
    assert len(np.unique(maps)) > 50


def test_rows_and_search(served, library):
    archive = library.archive("test")
    rows = get(f"{served}/rows?split=test&of=0,9,4")["rows"]
    assert [row[:2] for row in rows] == [[0, archive[0].key], [9, archive[9].key], [4, archive[4].key]]
    assert archive[4].turns[0].text[:20] in rows[2][2]
    for words in ("circle", "CIRC", "red circle", "nowhere"):
        found = get(f"{served}/search?split=test&q={words.replace(' ', '+')}")
        text = [" ".join(turn.text for turn in one.turns).casefold() for one in archive]
        want = [i for i, t in enumerate(text) if all(re.search(rf"\b{w}", t) for w in words.casefold().split())]
        assert found == {"found": want, "count": len(want), "searched": 10, "of": 10}
    key = archive[7].key
    assert get(f"{served}/search?split=test&q={key}")["found"] == [7]
    assert get(f"{served}/search?split=test&q={key[:5]}")["found"] == list(range(10))


def test_a_long_search_goes_on_where_it_stopped(library, monkeypatch):
    """Shards are read one request after another when time is short; what comes out at the end is the same."""
    archive = library.archive("train")
    monkeypatch.setattr("pipeline.report.library.PATIENCE", 0)
    parts = [archive.shard(0)]
    fake = type("Three", (), {"shards": [0, 1, 2], "shard": lambda self, n: parts[0], "__len__": lambda self: 12})()
    texts = Texts(fake)
    word = archive[0].turns[0].text.split()[0]
    seen = [texts.search(word) for _ in range(3)]
    assert [one["searched"] for one in seen] == [4, 8, 12]
    assert len(seen[2]["found"]) == 3 * len(seen[0]["found"]) > 0


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/example?split=test&index=99",
        "/example?split=test&index=x",
        "/example?split=../secret&index=0",
        "/example?split=..%2f..%2fsecret&index=0",
        "/rows?split=test&of=0,-1",
        "/rows?split=test&of=10",
        "/rows?split=../test&of=0",
        "/search?split=../test&q=a",
        "/image?split=test&index=%c2%b2",
        "/browse.html",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/example",
        "/maps?split=test&index=0&kind=teacher&name=../x",
        "/maps?split=test&index=0&kind=student&name=none",
        "/../stages/browse.py",
    ],
)
def test_what_is_not_there(served, path):
    with pytest.raises(urllib.error.HTTPError) as error:
        fetch(served + path)
    assert error.value.code == 404


def status(served, target, **headers):
    """The status of a request whose target is sent exactly as it is given."""
    place = served.removeprefix("http://")
    connection = http.client.HTTPConnection(place, timeout=60)
    connection.putrequest("GET", target, skip_host=True)
    for name, value in {"Host": place, **headers}.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    found = connection.getresponse().status
    connection.close()
    return found


def test_only_this_machine_and_this_page(served):
    place, port = served.removeprefix("http://").split(":")
    assert place == HOST == "127.0.0.1"
    for name in NAMES:
        assert status(served, "/about", Host=f"{name}:{port}") == 200
    for name in (
        "evil.example",
        f"evil.example:{port}",
        f"{HOST}:{int(port) - 1}",
        HOST,
        f"{HOST}.evil.example:{port}",
        "",
    ):
        assert status(served, "/about", Host=name) == 403, name
    assert status(served, "/about", Sec_Fetch_Site="same-origin") == 200
    assert status(served, "/image?split=test&index=0", Sec_Fetch_Site="cross-site") == 403
    assert status(served, "/image?split=test&index=0", Sec_Fetch_Site="same-site") == 403


@pytest.mark.parametrize(
    "target", ["/../stages/browse.py", "/../../../../etc/passwd", "/./browse.js/../../x", "/\\..\\x"]
)
def test_no_path_leads_out(served, target):
    assert status(served, target) == 404


def test_nothing_but_reading(served):
    request = urllib.request.Request(f"{served}/about", method="POST", data=b"x")
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=60)
    assert error.value.code == 501


@pytest.fixture
def tab(chromium, served):
    with visit(chromium, f"{served}/#test/3") as page:
        page.locator("#status", has_text="with a map").wait_for(timeout=60_000)
        yield page


HEAT = """canvas => { const c = canvas.getContext("2d"), {width, height} = canvas;
  const mean = (y, h) => { const d = c.getImageData(0, y, width, h).data; let sum = 0;
    for (let i = 0; i < d.length; i += 4) sum += d[i] + d[i + 1] + d[i + 2]; return sum / d.length; };
  return [mean(0, Math.round(height / 64)), mean(Math.round(height / 2), Math.round(height / 2) - 1)]; }"""


def test_pointing_at_a_word_shows_its_map(tab, served):
    one = get(f"{served}/example?split=test&index=3")
    words = tab.locator("#turns .word")
    assert words.count() == len(one["words"])
    assert tab.locator("#status").inner_text() == f"{len(one['words'])} words, {len(one['words'])} with a map"
    canvas = tab.locator("#panels canvas").nth(1)
    plain = canvas.evaluate(HEAT)
    word = words.nth(2)
    word.hover()
    assert canvas.get_attribute("data-shown") == ",".join(map(str, one["words"][2]))
    assert canvas.get_attribute("aria-label") == f"where tiny looks for {word.inner_text()}"
    top, below = canvas.evaluate(HEAT)
    assert top > below + 30, "this teacher's maps are bright in the first row of cells"
    assert below < plain[1]
    assert tab.locator("#panels canvas").first.get_attribute("data-shown") == "", "the image itself stays"


def test_students_beside_the_teacher(tab):
    for name in ("base", "sft-1", "lavender-1"):
        tab.get_by_label(name, exact=True).check()
    answer = tab.locator(".turn", has_text="assistant").locator(".word").first
    tab.locator("#panels small", has_text="reading…").first.wait_for(state="detached", timeout=120_000)
    answer.hover()
    shown = tab.locator("#panels canvas").evaluate_all("all => all.map(c => c.dataset.shown)")
    assert len(shown) == 5
    assert shown[0] == ""
    assert len(set(shown[1:])) == 1
    assert shown[1]
    assert tab.locator("#panels figcaption").all_inner_texts()[-1].startswith("lavender-1")


def test_list_search_and_keyboard(tab, served):
    rows = tab.locator("#list [role=option]")
    assert tab.locator("#list [aria-selected=true]").inner_text().startswith("3 ")
    tab.locator("#list").focus()
    tab.keyboard.press("ArrowDown")
    tab.locator("#meta", has_text=get(f"{served}/example?split=test&index=4")["key"]).wait_for()
    assert tab.url.endswith("#test/4")
    tab.keyboard.press("End")
    tab.locator("#list [aria-selected=true]", has_text="9 ").wait_for()
    wanted = get(f"{served}/search?split=test&q=circle")["found"]
    tab.locator("#search").fill("circle")
    tab.locator("#count", has_text=f"{len(wanted)} found").wait_for()
    assert [int(text.split()[0]) for text in rows.all_inner_texts()] == wanted
    rows.first.click()
    tab.locator("#list [aria-selected=true]", has_text=f"{wanted[0]} ").wait_for()
    first = tab.locator("#turns .word").first
    first.focus()
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#turns .word.on").inner_text() == tab.locator("#turns .word").nth(1).inner_text()
    assert tab.locator("#word").inner_text() == f"“{tab.locator('#turns .word').nth(1).inner_text()}”"


@pytest.mark.parametrize(("width", "scheme"), list(zip(WIDTHS, SCHEMES * 2, strict=True)))
def test_page_fits(chromium, served, width, scheme):
    with visit(chromium, f"{served}/#test/3", width, scheme) as page:
        page.locator("#status", has_text="with a map").wait_for(timeout=60_000)
        check_layout(page)
        for part in ("#list", "#panels", "#turns", "#meta", "#search"):
            assert page.locator(part).is_visible()
        assert page.locator("#panels canvas").first.bounding_box()["width"] > 100
