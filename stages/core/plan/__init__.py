"""What a config says before anything runs: its checks, its flags, its costs. It imports no other room."""
