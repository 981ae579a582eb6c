"""`dpofast train`: a small trainer for preferences. One process or several, one file of options, no hidden state.

`config.py` has the options, `engine.py` the loop, `checkpoint.py` and `state.py` what a run leaves to go on from,
`references.py` the reference's log-probs on disk. A run that is killed at any moment and resumed ends, on a CPU, with
the parameters of one that was not, to the bit. docs/train.md has the page for users.
"""

from dpofast.train.command import main
from dpofast.train.config import Config

__all__ = ["Config", "main"]
