"""``python -m ultramem_cuda.examples.lm train`` and ``pack``."""

import sys

from .arguments import main

sys.exit(main())
