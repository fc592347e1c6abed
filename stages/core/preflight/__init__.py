"""What preflight checks, times and shows. It may import `artifacts`, `data`, `evaluation`, `execution`,
`method`, `models`, `plan`, `policies` and `training`.
"""
