"""``python -m resnet_flax.predict RUN_DIR IMAGE...``, as the cards of version 0.1.0 say it."""

import sys

from resnet_flax.__main__ import run

if __name__ == "__main__":
    sys.exit(run("predict"))
