"""`python -m gemma_ft`: the same as the console script `gemma-ft`."""

import sys

from gemma_ft.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
