"""`stages.hub` and `stages.maps` as commands: shards and maps to a URL, maps to the authors' layout, and back."""

import errno
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
from quick_disk import quick_disk  # noqa: F401 (used by every test)
from test_verify import cfg, damage, folder, store  # noqa: F401 (cfg is a fixture)

from pipeline import receipts, remote, verify
from pipeline.archive.read import Archive
from pipeline.layout import Layout
from pipeline.mapstore.read import MapStore
from pipeline.mapstore.schema import STATUS
from stages import hub, maps


@pytest.fixture
def made(cfg, tmp_path):  # noqa: F811
    """Examples and maps of one data set, and the settings that name it on a command line."""
    cfg.teacher.name = "tiny"
    store(cfg, Layout(cfg).maps_split_dir("train"))
    return SimpleNamespace(
        cfg=cfg,
        maps=Layout(cfg).maps_split_dir("train"),
        settings=["data=llava_json", "data.name=d", f"data.path={tmp_path}/list.json", "teacher.splits=[train]"],
        here=f"shards_dir={tmp_path}/s",
    )


@pytest.fixture
def call(monkeypatch, capsys):
    """A command in this process: its exit code and what it printed."""

    def run(module, *argv):
        monkeypatch.setattr(sys, "argv", [module.__name__, *argv])
        capsys.readouterr()
        code = module.main()
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_shards_and_maps_go_to_a_url_and_back(made, command, call, tmp_path):
    url, there = f"file://{tmp_path}/bucket", f"shards_dir={tmp_path}/there"
    sent = command("hub", "push", url, *made.settings, made.here)
    assert (sent.returncode, sent.stderr) == (0, "")
    assert "pushed 11 files" in sent.stdout
    assert call(hub, "push", f"{url}/maps", "maps", *made.settings, made.here)[0] == 0
    got = command("hub", "pull", url, *made.settings, there)
    assert (got.returncode, got.stderr) == (0, "")
    assert "pulled 3 shards" in got.stdout
    assert call(hub, "pull", f"{url}/maps", "maps", *made.settings, there)[0] == 0
    examples, stored = tmp_path / "there/d/examples/train", tmp_path / "there/d/maps/tiny/train"
    assert list(Archive(examples)) == list(Archive(folder(made.cfg)))
    assert np.array_equal(MapStore(stored).get("0000100001").maps, MapStore(made.maps).get("0000100001").maps)
    made.cfg.shards_dir = str(tmp_path / "there")
    verify.verify(made.cfg)

    damage(tmp_path / "bucket/train/00001.tar")
    code, said = call(hub, "pull", url, *made.settings, f"shards_dir={tmp_path}/third")
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith("error: ") and "00001.tar: arrived other than its receipt vouches for" in said
    assert not (tmp_path / "third/d/examples/manifest.json").exists()
    for wrong in (["push"], ["move", url], ["push", url, "lazy=true"], ["pull", url, "more"]):
        code, said = call(hub, *wrong, *made.settings, there)
        assert (code, said.startswith("error: usage:")) == (2, True)
    code, said = call(hub, "pull", f"{url}/nowhere", *made.settings, f"shards_dir={tmp_path}/fourth")
    assert code == 2 and "manifest.json: cannot be fetched" in said


def test_what_is_pulled_lazily_comes_when_it_is_used(made, call, tmp_path):
    url, there = f"file://{tmp_path}/bucket", f"shards_dir={tmp_path}/there"
    assert call(hub, "push", url, *made.settings, made.here)[0] == 0
    assert call(hub, "push", f"{url}/maps", "maps", *made.settings, made.here)[0] == 0
    code, said = call(hub, "pull", url, "lazy=true", *made.settings, there)
    assert code == 0 and "the rest when it is used" in said
    assert call(hub, "pull", f"{url}/maps", "maps", "lazy=true", *made.settings, there)[0] == 0
    examples, stored = tmp_path / "there/d/examples/train", tmp_path / "there/d/maps/tiny/train"
    assert not list(examples.glob("*.tar")) and not list(stored.glob("*.zarr"))

    archive, whole = Archive(examples), Archive(folder(made.cfg))
    assert (len(archive), archive.keys) == (len(whole), whole.keys)
    assert not list(examples.glob("*.tar"))
    assert archive[3] == whole[3]
    assert [path.name for path in examples.glob("*.tar")] == ["00001.tar"]
    assert MapStore(stored).get("0000000001").words == MapStore(made.maps).get("0000000001").words
    assert [path.name for path in stored.glob("*.zarr")] == ["00000.zarr"]
    receipts.check(examples / "manifest.json", full=True)
    damage(examples / "00001.tar")
    with pytest.raises(receipts.Damaged, match=r"00001\.tar"):
        receipts.check(examples / "manifest.json", full=True)

    damage(tmp_path / "bucket/train/00002.tar")
    with pytest.raises(receipts.Damaged, match=r"00002\.tar: arrived other"):
        archive[4]
    assert not (examples / "00002.tar").exists()
    (examples.parent / "remote.json").unlink()  # then what is missing is missing
    with pytest.raises(receipts.Damaged, match=r"00000\.tar: is missing"):
        Archive(examples)


def test_a_push_to_the_hub_makes_few_commits(made, monkeypatch):
    """The hub's own calls are replaced; what they would be asked to do is compared."""
    import huggingface_hub

    commits = []

    class Api:
        def __init__(self, endpoint, token):
            assert endpoint.startswith("http")

        def create_commit(self, repo_id, operations, *, commit_message, repo_type, revision):
            commits.append((repo_id, repo_type, revision, [added.path_in_repo for added in operations]))

    place = SimpleNamespace(repo_id="me/world", repo_type="dataset", revision="main", path_in_repo="v1")
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub.HfFileSystem, "resolve_path", lambda self, path: place)
    monkeypatch.setattr(remote, "COMMIT_FILES", 6)
    assert remote.push(Layout(made.cfg).examples_dir(), "hf://datasets/me/world/v1") == 11
    assert [(repo, kind, revision, len(names)) for repo, kind, revision, names in commits] == [
        ("me/world", "dataset", "main", 6), ("me/world", "dataset", "main", 5),
    ]  # fmt: skip
    names = [name for *_, part in commits for name in part]
    assert "v1/train/00000.tar" in names
    assert names[-1] == "v1/manifest.json"
    assert isinstance(fsspec.filesystem("hf"), huggingface_hub.HfFileSystem)


def test_a_full_disk_is_one_line(made, call, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")  # as a failed write says it, without a name

    monkeypatch.setattr(Path, "write_bytes", full)
    code, said = call(maps, "export", str(tmp_path / "out"), *made.settings, made.here)
    assert (code, said.count("\n")) == (2, 1)
    assert f"{tmp_path / 'out'}: no space is left" in said


def test_maps_go_to_the_authors_layout_and_back(made, command, call, tmp_path):
    out = tmp_path / "authors"
    told = command("maps", "export", str(out), *made.settings, made.here)
    assert (told.returncode, told.stderr) == (0, "")
    assert "maps: exported 30 maps of 6 examples; not kept: 6 repeats of a word, 12 words with _" in told.stdout
    assert (out / "lpm_attention/0/attention_red.jpg").is_file()
    code, said = call(maps, "import", str(out), *made.settings, made.here)
    assert code == 2 and "has maps already" in said
    told = command("maps", "import", str(out), "teacher.name=authors", *made.settings, made.here)
    assert (told.returncode, told.stderr) == (0, "")
    assert "maps: imported 42 maps of 6 examples; not kept: 12 words without a file" in told.stdout
    back = MapStore(Layout(made.cfg).shards / "maps/authors/train")
    for example in Archive(folder(made.cfg)):
        first, second = MapStore(made.maps).get(example.key), back.get(example.key)
        assert second.words == first.words
        assert second.status[3] == STATUS["no_window"]
        assert np.abs(second.maps[2].astype(int) - first.maps[2]).max() <= 0.04 * 255
    for wrong in (["export"], ["turn", str(out)], ["export", str(out), "more"]):
        code, said = call(maps, *wrong, *made.settings, made.here)
        assert (code, said.startswith("error: usage:")) == (2, True)
    code, said = call(maps, "import", str(tmp_path / "no"), "teacher.name=other", *made.settings, made.here)
    assert (code, said.count("\n")) == (2, 1)
    assert "lpm_attention" in said
    assert json.loads((Layout(made.cfg).shards / "maps/authors/train/manifest.json").read_text())["stage"] == "import"
