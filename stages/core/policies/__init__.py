"""What is done with a policy: load it, encode pairs for it, sample from it, save it. It may import
`method`, `models`, `artifacts` and `execution`.
"""
