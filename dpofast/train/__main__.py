"""``python -m dpofast.train``, which is what torchrun and accelerate launch start."""

import sys

from dpofast.train import main

sys.exit(main())
