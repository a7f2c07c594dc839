"""torchrun with this project's exit codes: what stops its processes is told by them, not once more as a traceback.

python -m stages.torchrun [words of torchrun] -m stages.train [name=value ...]
"""

import logging
import os
import sys
from collections.abc import Sequence

from stages.cli import CHILD, USER_ERROR, follow_parent


def main(argv: Sequence[str] | None = None) -> int:
    if CHILD in os.environ:
        follow_parent()
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    # Its own reports of what it does; whatever is not told by the processes is raised below.
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        torchrun(sys.argv[1:] if argv is None else list(argv))
    except ChildFailedError as error:
        if USER_ERROR not in {failure.exitcode for failure in error.failures.values()}:
            raise
        return USER_ERROR
    except SignalException as error:  # its processes were told, and have ended
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
