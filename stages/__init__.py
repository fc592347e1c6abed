"""SAIL as a chain of standalone stages over a small library (`stages.core`)."""
