"""What the doctor looks at: the installation, the processes of a run, its files. It may import
`artifacts` and `execution`.
"""
