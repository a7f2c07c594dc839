"""How fast `make browse` is over many examples, in a real browser: `make bench-browse`.

    python -m benchmarks.browse --examples 130000 --json results/browse.json

Generates an archive with maps of every word, in a temporary directory that is removed afterwards, serves it as
`make browse` does and drives the page in headless Chromium. Milliseconds are taken in the page: from the start of the
navigation, or from the choice of an example to the frame in which image, words and maps are there.

    start_seconds        from the command to the address
    first_paint_ms       first paint of the page, from the start of the navigation (the most of several pages)
    first_loaded_ms      its first example, from there as well (median), and
    first_example_ms     from when the page asks for it (the most); each page begins at a shard that nobody has opened
    example_ms_*         examples drawn at random, so that most are the first of their shard (median, 95%, most)
    revisit_ms_median    the same examples again
    versus_small         example_ms_median against that of an archive of a hundredth, measured in the same run
    list_ms_*            the list scrolled to a random place, until its rows have their texts
    search_first_seconds, search_ms   a word in all texts, the first time and again; key_ms: an example by its key
    hover_ms             drawing a word's map
    student_ms_median    an example with the bundled student's attention beside the teacher's, once it is loaded
    peak_mb              memory of the server at its peak

The last line is `RESULT {...}`.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.data import smooth_maps
from pipeline import receipts
from pipeline.archive.read import Archive
from pipeline.archive.stage import shard
from pipeline.config import compose
from pipeline.examples import Example
from pipeline.mapstore.schema import ExampleMaps, example_maps
from pipeline.mapstore.write import write_shard

SIZE = (320, 240)
PICTURES = 64  # different images; every example has a copy of one
WORDS = (
    "dog cat horse man woman child boat river mountain street table bottle window garden bicycle train red yellow "
    "green blue small large old wooden bright running sleeping standing waiting under behind above the a and with"
).split()
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]

# Chooses an example and waits for the frame in which it is all there.
OPEN = """async ([split, index]) => {
  const mark = `shown-${split}-${index}`, frame = () => new Promise(requestAnimationFrame);
  performance.clearMarks(mark);
  const start = performance.now();
  location.hash = `#${split}/${index}`;
  while (!performance.getEntriesByName(mark).length) await new Promise((done) => setTimeout(done, 0));
  await frame();
  return performance.now() - start;
}"""
SCROLL = """async (share) => {
  const list = document.getElementById("list"), start = performance.now();
  list.scrollTop = share * (list.scrollHeight - list.clientHeight);
  do await new Promise(requestAnimationFrame);
  while ([...list.querySelectorAll(".row span")].some((row) => row.textContent === "…"));
  return performance.now() - start;
}"""
SEARCH = """async (text) => {
  const field = document.getElementById("search"), start = performance.now();
  performance.clearMarks("searched");
  field.value = text;
  field.dispatchEvent(new Event("input"));
  while (!performance.getEntriesByName("searched").length) await new Promise((done) => setTimeout(done, 1));
  await new Promise(requestAnimationFrame);
  return performance.now() - start;
}"""
HOVER = """() => [...document.querySelectorAll(".word")].map((word) => {
  const start = performance.now();
  word.dispatchEvent(new PointerEvent("pointerenter"));
  return performance.now() - start;
})"""
FIRST = """() => [performance.getEntriesByName("first-contentful-paint")[0].startTime,
  performance.getEntriesByType("mark").filter((mark) => mark.name.startsWith("shown-"))[0].startTime,
  performance.getEntriesByType("resource").filter((one) => one.name.includes("/example?"))[0].startTime]"""
PAGES = 5  # loaded afresh


def write_data(folder: Path, count: int) -> list[str]:
    """Shards `count` examples and their maps below a folder; returns the overrides that name them."""
    rng, choose = np.random.default_rng(0), random.Random(0)
    folder.mkdir()
    for number in range(PICTURES):
        small = Image.fromarray(rng.integers(0, 255, (SIZE[1] // 16, SIZE[0] // 16, 3), np.uint8))
        small.resize(SIZE, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=85)
    with (folder / "list.jsonl").open("w") as file:
        for number in range(count):
            answer = " ".join(choose.choices(WORDS, k=12)) + f" {number}."
            talk = [{"from": "human", "value": "<image>\nWhat is there?"}, {"from": "gpt", "value": answer}]
            record = {"id": str(number), "image": f"{number % PICTURES}.jpg", "conversations": talk}
            file.write(json.dumps(record) + "\n")
    named = [f"data.path={folder}/list.jsonl", f"shards_dir={folder}/shards", f"runs_dir={folder}/runs"]
    overrides = ["data=llava_json", "data.name=many", *named]
    cfg = compose([*overrides, "data.check_images=false"])
    shard(cfg)
    levels = example_maps("pool", [None] * 512, smooth_maps(512, 0))
    place = folder / "shards" / "many" / "maps" / "tiny" / "train"
    archive = Archive(folder / "shards" / "many" / "examples" / "train", hashed=False)
    made = []
    for number, tar in enumerate(archive.shards):
        rows = [_maps_of(one, levels, rng) for one in archive.shard(number)]
        write_shard(place / f"{tar.stem}.zarr", rows)
        made.append(place / f"{tar.stem}.json")
        receipts.write(made[-1], stage="bench", settings={}, files=[place / f"{tar.stem}.zarr"], durable=True)
    receipts.write(place / "manifest.json", stage="bench", settings={}, children=made)
    return overrides


def _maps_of(one: Example, levels: ExampleMaps, rng: np.random.Generator) -> ExampleMaps:
    words = one.words()
    rows = rng.integers(0, len(levels.maps), len(words))
    return ExampleMaps(one.key, words, levels.maps[rows], levels.range[rows], levels.status[rows])


@contextmanager
def served(overrides: list[str]) -> Iterator[tuple[str, float, int]]:
    """Address, seconds until it was there and process of `python -m stages.browse`."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "stages.browse", "--port", "0", *overrides]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()
        yield re.search(r"http://\S+", line)[0], time.perf_counter() - began, server.pid
    finally:
        server.terminate()
        server.wait()


def measure(browser, overrides: list[str], count: int, tries: int, whole: bool) -> dict[str, float]:
    """Milliseconds of one archive; only opening examples unless `whole`."""
    choose = random.Random(1)
    numbers = [choose.randrange(count) for _ in range(tries)]
    with served(overrides) as (address, start, process):
        paints, loaded, asked = [], [], []
        for part in range(1, PAGES + 1):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(f"{address}#train/{part * count // (PAGES + 1)}")
            page.locator("#status", has_text="with a map").wait_for()
            paint, shown, choice = page.evaluate(FIRST)
            paints.append(paint)
            loaded.append(shown)
            asked.append(shown - choice)
            if part < PAGES:
                page.close()
        opened = [page.evaluate(OPEN, ["train", number]) for number in numbers]
        again = [page.evaluate(OPEN, ["train", number]) for number in numbers]
        found = {
            "start_seconds": start,
            "first_paint_ms": max(paints),
            "first_loaded_ms": statistics.median(loaded),
            "first_example_ms": max(asked),
            "example_ms_median": statistics.median(opened),
            "example_ms_95": float(np.quantile(opened, 0.95)),
            "example_ms_most": max(opened),
            "revisit_ms_median": statistics.median(again),
        }
        if whole:
            found |= _more(page, count, tries, choose)
        found["peak_mb"] = _peak_mb(process)
        page.close()
    return found


def _more(page, count: int, tries: int, choose: random.Random) -> dict[str, float]:
    hover = page.evaluate(HOVER)
    scrolled = [page.evaluate(SCROLL, choose.random()) for _ in range(tries)]
    first = page.evaluate(SEARCH, "bicycle")
    again = [page.evaluate(SEARCH, word) for word in ("river dog", "wooden", f"{count // 3}")]
    key = page.evaluate(SEARCH, "0000100007" if count > 2000 else "0000000007")
    page.get_by_label("base", exact=True).check()
    page.locator("#panels small", has_text="reading…").first.wait_for(state="detached", timeout=120_000)
    student = [page.evaluate(OPEN, ["train", choose.randrange(count)]) for _ in range(max(5, tries // 4))]
    return {
        "hover_ms": statistics.median(hover),
        "list_ms_median": statistics.median(scrolled),
        "list_ms_95": float(np.quantile(scrolled, 0.95)),
        "search_first_seconds": first / 1000,
        "search_ms": statistics.median(again),
        "key_ms": key,
        "student_ms_median": statistics.median(student),
    }


def _peak_mb(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=130_000)
    parser.add_argument("--tries", type=int, default=100, help="examples opened")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    given = parser.parse_args()
    from playwright.sync_api import sync_playwright

    os.environ["OMP_NUM_THREADS"] = "1"
    small = max(200, given.examples // 100)
    with tempfile.TemporaryDirectory(prefix="bench-browse-") as folder, sync_playwright() as playwright:
        began = time.perf_counter()
        few, many = (write_data(Path(folder) / name, n) for name, n in (("few", small), ("many", given.examples)))
        print(f"{given.examples} examples with maps generated in {time.perf_counter() - began:.0f} s", flush=True)
        browser = playwright.chromium.launch(executable_path=given.chromium, args=FLAGS)
        beside = measure(browser, few, small, given.tries, whole=False)
        found = measure(browser, many, given.examples, given.tries, whole=True)
        browser.close()
    found = {"examples": given.examples, **found, "small_examples": small}
    found["small_example_ms_median"] = beside["example_ms_median"]
    found["versus_small"] = found["example_ms_median"] / beside["example_ms_median"]
    result = {name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    for name, value in result.items():
        print(f"{name:24} {value:,}")
    print(f"RESULT {json.dumps(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
