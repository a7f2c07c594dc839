"""Reads the map store and writes the Lavender authors' layout, one JPEG per word; or the other way round.

python -m stages.maps export FOLDER [split=train] [data=... teacher=...]
python -m stages.maps import FOLDER [split=train] [data=... teacher=...]
"""

import sys
from pathlib import Path

from stages.cli import guarded, usage

ACTIONS = ("export", "import")


def main() -> int:
    given = sys.argv[1:]
    if {"-h", "--help"} & set(given):
        print(usage(__doc__))
        return 0
    return guarded(lambda: exchange(given))


def exchange(given: list[str]) -> None:
    """Composes the settings and runs one action."""
    from pipeline.config import compose
    from pipeline.errors import UserError, room_in
    from pipeline.layout import Layout

    plain = [word for word in given if "=" not in word]
    if len(plain) != 2 or plain[0] not in ACTIONS:
        raise UserError("usage: python -m stages.maps export|import FOLDER [split=train] [data=... teacher=...]")
    split = next((word.partition("=")[2] for word in given if word.startswith("split=")), "train")
    layout = Layout(compose([word for word in given if "=" in word and not word.startswith("split=")]))

    from pipeline.archive.read import Archive
    from pipeline.mapstore.exchange import export, import_maps
    from pipeline.mapstore.read import MapStore

    archive, folder, store = Archive(layout.examples_dir(split)), Path(plain[1]), layout.maps_split_dir(split)
    if plain[0] == "export":
        with room_in(folder):
            result = export(archive, MapStore(store), folder)
    else:
        if (store / "manifest.json").exists():
            raise UserError(f"{store}: has maps already: name another teacher for the imported ones")
        with room_in(store):
            result = import_maps(archive, folder, store)
    print(f"maps: {plain[0]}ed {result.summary}")


if __name__ == "__main__":
    sys.exit(main())
