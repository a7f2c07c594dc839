"""Reads shards/<data>/ (examples and maps); writes runs/<model>/<data>/<arm>-<seed>/: checkpoints, metrics, student."""

import sys

from stages.cli import stage


def main() -> int:
    return stage("pipeline.train.stage", "train", __doc__)


if __name__ == "__main__":
    sys.exit(main())
