"""Reads shards/<data>/examples/; writes shards/<data>/maps/<teacher>/<split>/: one Zarr group of word maps per tar."""

import sys

from stages.cli import stage


def main() -> int:
    return stage("pipeline.teacher.stage", "precompute", __doc__)


if __name__ == "__main__":
    sys.exit(main())
