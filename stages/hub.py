"""Reads the shards or maps of DATA and writes them to a URL, or the other way round; every byte is checked.

    python -m stages.hub push URL [maps] [data=... teacher=...]
    python -m stages.hub pull URL [maps] [lazy=true] [data=... teacher=...]

URL is anything fsspec knows: hf://datasets/OWNER/NAME/world, s3://bucket/folder, file:///mnt/shared/world. With `maps`
the maps of TEACHER are meant, each split below URL, else the examples. With `lazy=true` receipts and tables come now,
each tar and each shard of maps when training first uses it, checked in the same way.
"""

import sys

from stages.cli import guarded, usage

USAGE = "usage: python -m stages.hub push|pull URL [maps] [lazy=true] [data=... teacher=...]"
LAZY = "lazy=true"


def main() -> int:
    given = sys.argv[1:]
    if {"-h", "--help"} & set(given):
        print(usage(__doc__))
        return 0
    return guarded(lambda: move(given))


def move(given: list[str]) -> None:
    """Composes the settings and moves one folder."""
    from pipeline.config import compose
    from pipeline.errors import UserError, room_in
    from pipeline.layout import Layout

    plain = [word for word in given if "=" not in word]
    maps = "maps" in plain[2:]
    lazy = LAZY in given
    if len(plain) != 2 + maps or plain[0] not in ("push", "pull") or (lazy and plain[0] == "push"):
        raise UserError(USAGE)
    cfg = compose([word for word in given if "=" in word and word != LAZY])
    layout, url = Layout(cfg), plain[1].rstrip("/")
    folders = {url: layout.examples_dir()}
    if maps:
        folders = {f"{url}/{split}": layout.maps_split_dir(split) for split in cfg.teacher.splits}

    from pipeline.remote import pull, push

    for place, folder in folders.items():
        if plain[0] == "push":
            print(f"hub: pushed {push(folder, place)} files of {folder} to {place}")
        else:
            when = ", the rest when it is used" if lazy else ""
            with room_in(folder):
                fetched = pull(place, folder, lazy=lazy)
            print(f"hub: pulled {fetched} shards from {place} into {folder}{when}")


if __name__ == "__main__":
    sys.exit(main())
