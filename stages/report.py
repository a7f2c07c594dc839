"""Reads runs/<model>/<data>/ and the maps; writes runs/<model>/<data>/report/: a self-contained HTML page, pictures."""

import sys

from stages.cli import stage


def main() -> int:
    return stage("pipeline.report.stage", "report", __doc__)


if __name__ == "__main__":
    sys.exit(main())
