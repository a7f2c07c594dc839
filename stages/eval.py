"""Reads the test splits and every arm's run; writes runs/<model>/<data>/eval/: per-sample results, summary.json."""

import sys

from stages.cli import stage


def main() -> int:
    return stage("pipeline.evaluate.stage", "evaluate", __doc__)


if __name__ == "__main__":
    sys.exit(main())
