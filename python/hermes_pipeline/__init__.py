"""The pipeline: from conversations to an evaluated model, one module a stage."""
