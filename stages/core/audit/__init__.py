"""The audit of a run's pairs: an index over its tables, its pictures by reference, and the decisions of a
person. It may import `artifacts`, `evaluation` and `pages`.
"""
