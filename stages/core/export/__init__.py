"""What leaves the project for other tools: policies, preference pairs, their cards. It may import
`artifacts`, `models` and `execution`.
"""
