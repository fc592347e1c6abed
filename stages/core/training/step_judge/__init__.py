"""Training what judges unfinished images: a step-aware preference model, from human pairs."""
