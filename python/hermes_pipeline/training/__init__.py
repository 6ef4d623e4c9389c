"""Training on packed rows through torchtitan; `python -m hermes_pipeline.training` is the entry."""
