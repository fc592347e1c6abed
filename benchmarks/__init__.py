"""Measurements of the whole: each by one command, each with its result committed beside it."""
