"""Random configs, prompt files, labels, images and artifacts: each ends in a result or a clear error.

Example:
    python -m tests.fuzz --cases 10000
"""
