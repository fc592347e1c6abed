"""What a file of a run says of itself, and how two runs differ. It may import `artifacts`, `data` and
`evaluation`.
"""
