"""The only folder that imports torchtitan. Importing it sets torchtitan's device first."""

from hermes_pipeline.training.titan import device as device  # before any other torchtitan module
