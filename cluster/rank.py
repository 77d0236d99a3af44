"""What the launcher starts on a node, once per GPU: `t2v train`, its output in a file of its own.

Rank 0 speaks to the job's log. Nothing here imports torch.
"""

import os
import sys
from pathlib import Path


def main(folder: str, *arguments: str) -> None:
    """Become `t2v train`; the launcher's own streams stay free for the launcher."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        os.dup2(1, 2)  # the launcher's stderr is a file of its own
    else:
        log = Path(folder) / f"rank-{rank:05d}.log"
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
    os.execv(sys.executable, [sys.executable, "-m", "t2v.cli", "train", *arguments])


if __name__ == "__main__":
    main(*sys.argv[1:])
