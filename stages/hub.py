"""Reads the shards or maps of DATA and writes them to a URL, or the other way round; every byte is checked.

    python -m stages.hub push URL [maps] [data=... teacher=...]
    python -m stages.hub pull URL [maps] [data=... teacher=...]

URL is anything fsspec knows: hf://datasets/OWNER/NAME/world, s3://bucket/folder, file:///mnt/shared/world. With `maps`
the maps of TEACHER are meant, each split below URL, else the examples.
"""

import sys

from stages.cli import guarded, usage

USAGE = "usage: python -m stages.hub push|pull URL [maps] [data=... teacher=...]"


def main() -> int:
    given = sys.argv[1:]
    if {"-h", "--help"} & set(given):
        print(usage(__doc__))
        return 0
    return guarded(lambda: move(given))


def move(given: list[str]) -> None:
    """Composes the settings and moves one folder."""
    from pipeline.config import compose
    from pipeline.errors import UserError
    from pipeline.layout import Layout

    plain = [word for word in given if "=" not in word]
    maps = "maps" in plain[2:]
    if len(plain) != 2 + maps or plain[0] not in ("push", "pull"):
        raise UserError(USAGE)
    cfg = compose([word for word in given if "=" in word])
    layout, url = Layout(cfg), plain[1].rstrip("/")
    folders = {url: layout.examples_dir()}
    if maps:
        folders = {f"{url}/{split}": layout.maps_split_dir(split) for split in cfg.teacher.splits}

    from pipeline.remote import pull, push

    for place, folder in folders.items():
        if plain[0] == "push":
            print(f"hub: pushed {push(folder, place)} files of {folder} to {place}")
        else:
            print(f"hub: pulled {pull(place, folder)} shards from {place} into {folder}")


if __name__ == "__main__":
    sys.exit(main())
