"""Reads every receipt of DATA and all that they vouch for; writes nothing, or with repair=true what is damaged."""

import sys

from stages.cli import stage

REPAIR = "repair=true"


def main() -> int:
    given = sys.argv[1:]
    function = "repair" if REPAIR in given else "verify"
    return stage("pipeline.verify", function, __doc__, [name for name in given if name != REPAIR])


if __name__ == "__main__":
    sys.exit(main())
