"""The stages, their order, and the run manifest."""
