"""The local page: one example at a time over real shards, maps and students; loopback only."""

import base64
import json
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
from http.server import ThreadingHTTPServer

import numpy as np
import pytest
from evaluate_world import settings, world  # noqa: F401 (a fixture)

from pipeline import receipts
from pipeline.archive import Archive
from pipeline.layout import Layout
from pipeline.mapstore import ExampleMaps
from pipeline.mapstore.write import write_shard
from pipeline.report.browse import HOST, Library, handler

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def served(world, tmp_path_factory):  # noqa: F811
    """Address of a server over the small world, whose teacher points at the first row of cells for every word."""
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
    server = ThreadingHTTPServer((HOST, 0), handler(Library(cfg)))
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
    one = get(f"{served}/example?split=test&index=3")
    assert one["teachers"] == ["tiny"]
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
    began = time.monotonic()
    get(f"{served}/maps?split=test&index=4&kind=student&name=sft-1")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/example?split=test&index=99",
        "/example?split=test&index=x",
        "/example?split=../secret&index=0",
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


def test_other_hosts_are_refused(served):
    with pytest.raises(urllib.error.HTTPError) as error:
        fetch(f"{served}/about", Host="evil.example:80")
    assert error.value.code == 403
    assert get(served.replace(HOST, "localhost") + "/about")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_page_in_a_browser(served, tmp_path):
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --dump-dom"
    ).split()
    found = ""
    for patience in (8_000, 30_000, 90_000):  # virtual milliseconds: a busy machine answers the page's requests late
        budget = [f"--virtual-time-budget={patience}", f"--user-data-dir={tmp_path}/profile{patience}"]
        command = [CHROMIUM, *flags, *budget, f"{served}/#test/3"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        if 'class="word"' in found:
            break
    words = get(f"{served}/example?split=test&index=3")["words"]
    assert found.count('class="word"') == len(words)
    assert f"{len(words)} words, {len(words)} with a map" in found
    assert '<option value="student/lavender-1">' in found
