"""`python -m model` is the `useg` command."""

import sys

from model.cli import main

if __name__ == "__main__":
    sys.exit(main())
