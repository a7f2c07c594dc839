"""What the benchmark of the teacher compares does the same work, and its last line has what is asked of it."""

import argparse
import json

import numpy as np
import torch
from test_teacher_windows import published, tokenizer

from benchmarks import teacher as benchmark
from pipeline.examples import words

KEYS = {
    "capture_time_ratio",
    "capture_memory_ratio",
    "refine_time_ratio",
    "store_all_overhead_ratio",
    "daam_overhead_ratio",
    "kept_bytes",
    "store_all_kept_bytes",
    "early_exit_ratio",
    "stage_vs_parts",
    "nfe",
    "null_text_nfe",
    "images_per_second",
    "hours_for_130000",
}


def test_the_layers_played_again_give_the_maps_of_the_forward():
    bench = benchmark.Bench(argparse.Namespace(shapes="tiny", batch=2, dtype="float32", device="cpu"))
    bench.record()
    assert len(bench.calls) == len(bench.adapters["capture"].layers) > 2
    ours = bench.run("capture")
    torch.testing.assert_close(bench.replay("capture"), ours)
    theirs = bench.replay("store")
    torch.testing.assert_close(theirs, bench.run("store"))
    # Of all tokens or the words' alone: the mean over heads and layers is the same, and clamping changes nothing here.
    torch.testing.assert_close(bench.replay("daam"), theirs)
    # Bicubic to 64x64 there, bilinear to 32x32 here: the same maps but for the resize.
    smaller = theirs.unflatten(-1, (32, 2)).unflatten(-3, (32, 2)).mean((-1, -3))
    assert np.corrcoef(smaller.flatten(), ours.flatten())[0, 1] > 0.95
    # Two grids of 77 positions against every head of every layer.
    layers = [layer.side**2 for layer in bench.adapters["capture"].layers]
    assert bench.kept_bytes["capture"] == 2 * 4 * 77 * sum(set(layers))
    assert bench.kept_bytes["store"] == 2 * 4 * 77 * sum(layers) * bench.whole.config.attention_head_dim


@published
def test_the_caption_is_cut_as_by_clip():
    own, real = benchmark.caption_tokenizer(), tokenizer("published")
    text = " ".join(benchmark.CAPTION)
    assert own.tokenize(text) == real.tokenize(text)
    assert (len(own.tokenize(text)), len(words(text))) == (28, 23)


def test_no_turn_begins_that_would_end_too_late(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(benchmark.time, "monotonic", lambda: now[0])

    def run(seconds):
        now[0] += seconds.pop()

    one, two = [2.0, 1.0, 4.0], [1.0, 2.0, 3.0]
    found = benchmark.in_turns({"one": lambda: run(one), "two": lambda: run(two)}, 3, 15, lambda: now[0] / 2)
    assert (found, found.wall, found.count) == ({"one": 0.5, "two": 1.0}, {"one": 1.0, "two": 2.0}, 2)


def test_the_last_line_has_every_ratio(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "memory", lambda args: dict.fromkeys(benchmark.MEASURED, 1000))
    benchmark.main(["--shapes", "tiny", "--threads", "1", "--repeat", "1", "--json", str(tmp_path / "out.json")])
    last = capsys.readouterr().out.splitlines()[-1]
    found = json.loads(last.removeprefix("RESULT "))
    assert set(found) >= KEYS
    assert all(found[key] > 0 for key in KEYS)
    assert found == json.loads((tmp_path / "out.json").read_text())
