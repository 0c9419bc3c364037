"""``python -m ultramem_cuda``: the command ``ultramem``."""

import sys

from .cli import main

# Processes that the command spawns import this file again.
if __name__ == "__main__":
    sys.exit(main())
