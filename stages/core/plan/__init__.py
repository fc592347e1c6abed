"""What a config says before anything runs: names, files, problems, flags, costs. It may import `data`, and of `method` what needs no torch."""
