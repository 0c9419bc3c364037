"""``python -m ultramem_cuda``: the command ``ultramem``."""

import sys

from .cli import main

sys.exit(main())
