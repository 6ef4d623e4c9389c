"""The entry point of every rank: `torchrun ... -m hermes_pipeline.training --recipe R ...`."""

from hermes_pipeline.training.run import main

raise SystemExit(main())
