"""The method and its plumbing, free of Snakemake and of command lines."""
