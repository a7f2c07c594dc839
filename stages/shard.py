"""Reads the source that DATA names; writes shards/<data>/examples/<split>/: tars, parquet tables and receipts."""

import sys

from stages.cli import stage


def main() -> int:
    return stage("pipeline.archive.stage", "shard", __doc__)


if __name__ == "__main__":
    sys.exit(main())
