"""Reads shards, maps and students; writes nothing: a page on this machine to look at every word's map.

python -m stages.browse [--port 8765] [name=value ...]
"""

import argparse
import sys
from collections.abc import Sequence

from stages.cli import guarded


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="stages.browse", description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="Hydra overrides")
    parser.add_argument("--port", type=int, default=8765, help="0 takes any free one")
    args = parser.parse_intermixed_args(argv)

    def body() -> None:
        from dataclasses import replace

        from pipeline.config import compose
        from pipeline.layout import Layout
        from stages.chain import DEMO_DIR

        cfg = compose(args.overrides)
        if (
            not args.overrides
            and not Layout(cfg).runs.is_dir()
            and Layout(replace(cfg, runs_dir=DEMO_DIR)).runs.is_dir()
        ):
            cfg = replace(cfg, runs_dir=DEMO_DIR)  # after the demo, with nothing else trained, its students are meant
            print(f"browse: students of {DEMO_DIR}", flush=True)
        from pipeline.report.browse import serve

        serve(cfg, args.port, lambda address: print(f"browse: {address} (Ctrl-C ends it)", flush=True))

    return guarded(body)


if __name__ == "__main__":
    sys.exit(main())
