"""The entry point of every rank: `torchrun ... -m hermes_pipeline.training --recipe R ...`."""

import os
import sys

from hermes_pipeline.training.run import main

code = main()
sys.stdout.flush()
sys.stderr.flush()
# Gloo's threads may yet free a tensor; in an interpreter that is closing, that aborts the process.
os._exit(code)
