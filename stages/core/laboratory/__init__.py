"""Experiments of many runs: which runs they take, what was measured, and what follows for their claims.

May import `plan`, `method`, `evaluation` and `artifacts`.
"""
