"""What leaves a run: model folders."""
