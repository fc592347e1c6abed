"""Training on what the policy itself samples while it is trained: SPO, DDPO, D3PO."""
