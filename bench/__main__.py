"""``python -m bench``: all benches, one record, one table."""

import sys

from .suite import main

# Processes that torch.compile starts may import this file again.
if __name__ == "__main__":
    sys.exit(main())
