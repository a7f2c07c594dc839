"""What the benchmark of the teacher compares does the same work, and its last line has what is asked of it."""

import argparse
import json

import numpy as np
import torch

from benchmarks import teacher as benchmark

KEYS = {
    "capture_time_ratio",
    "capture_memory_ratio",
    "refine_time_ratio",
    "store_all_overhead_ratio",
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
    # Bicubic to 64x64 there, bilinear to 32x32 here: the same maps but for the resize.
    smaller = theirs.unflatten(-1, (32, 2)).unflatten(-3, (32, 2)).mean((-1, -3))
    assert np.corrcoef(smaller.flatten(), ours.flatten())[0, 1] > 0.95


def test_the_last_line_has_every_ratio(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "memory", lambda args: dict.fromkeys(benchmark.MEASURED, 1000))
    benchmark.main(["--shapes", "tiny", "--threads", "1", "--repeat", "1", "--json", str(tmp_path / "out.json")])
    last = capsys.readouterr().out.splitlines()[-1]
    found = json.loads(last.removeprefix("RESULT "))
    assert set(found) >= KEYS
    assert all(found[key] > 0 for key in KEYS)
    assert found == json.loads((tmp_path / "out.json").read_text())
