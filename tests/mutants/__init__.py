"""Single wrong lines of the method, and whether a test notices each: `python -m tests.mutants`."""
