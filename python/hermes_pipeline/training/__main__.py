"""The entry point of every rank: `torchrun ... -m hermes_pipeline.training --recipe R ...`."""

import os
import sys
from contextlib import suppress

from hermes_pipeline.training.run import main

code = main()
for stream in (sys.stdout, sys.stderr):
    with suppress(OSError):  # nobody reads it any more
        stream.flush()
# Gloo's threads may yet free a tensor; in an interpreter that is closing, that aborts the process.
os._exit(code)
