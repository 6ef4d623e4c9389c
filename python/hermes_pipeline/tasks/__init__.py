"""Prompts to answer, each with the target that a verifier will judge."""
