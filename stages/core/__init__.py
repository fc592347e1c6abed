"""The library in rooms, free of Snakemake and of command lines; docs/design.md has their arrows."""
