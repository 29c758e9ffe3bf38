"""`python -m aiproxy`; from any directory also `python /opt/aiproxy/aiproxy`, which names this package."""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from aiproxy.command_line import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
