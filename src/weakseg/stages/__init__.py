"""The stages of a run: run folder in, run folder out."""
