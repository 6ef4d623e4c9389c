"""Answers to conversations, drawn many at a time."""
