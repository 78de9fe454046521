"""Run the command line: `python -m selector`, or `accelerate launch -m selector`."""

import sys

from selector.cli import main

if __name__ == "__main__":
    sys.exit(main())
