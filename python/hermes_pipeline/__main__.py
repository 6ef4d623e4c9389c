"""`python -m hermes_pipeline` is `hermes4`."""

from hermes_pipeline.cli import main

main()
