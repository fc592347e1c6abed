"""What a config says before anything runs: names, files, problems, flags, costs. It may import `data`."""
