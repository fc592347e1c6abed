"""The page of a run: its views, figures, pictures and template. It may import `evaluation` and
`artifacts`.
"""
