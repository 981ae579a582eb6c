"""`python -m dpofast.env_info [--json]`, the same as `dpofast env`."""

import sys

from dpofast.cli import main

sys.exit(main(["env", *sys.argv[1:]]))
