"""Training on Lightning: one adapter for methods and segmenters."""
