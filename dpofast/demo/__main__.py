"""``python -m dpofast.demo``."""

import sys

from dpofast.demo import main

sys.exit(main())
