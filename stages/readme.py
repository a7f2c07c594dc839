"""Reads results/demo.json (first kept from a summary.json, if one is given); writes the result section of README.md.

python -m stages.readme                                         # README.md from results/demo.json
python -m stages.readme runs/demo/summary.json --made-by "make demo SEEDS=5 ARMS=..."
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from stages.cli import guarded

KEPT = "results/demo.json"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="stages.readme", description=__doc__.splitlines()[0])
    parser.add_argument("summary", nargs="?", type=Path, help="a summary.json to keep as the results")
    parser.add_argument("--made-by", default="make demo", help="the command that made it")
    parser.add_argument("--root", type=Path, default=Path(), help="the repository")
    args = parser.parse_args(argv)

    def body() -> None:
        from pipeline.report.readme import keep, update

        kept = args.root / KEPT
        if args.summary:
            keep(args.summary, kept, args.made_by, datetime.now(UTC).date())
        changed = update(args.root / "README.md", kept, KEPT)
        print(f"README.md: {'written from' if changed else 'already says what is in'} {KEPT}")

    return guarded(body)


if __name__ == "__main__":
    sys.exit(main())
