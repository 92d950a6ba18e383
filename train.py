"""Trains a residual network: ``python train.py --epochs 10`` is D2L's run.

The job as a story is resnet_flax/runs/train.py; installed, ``resnet-flax train`` does the same.
"""

import sys

from resnet_flax.__main__ import run

if __name__ == "__main__":
    sys.exit(run("train"))
