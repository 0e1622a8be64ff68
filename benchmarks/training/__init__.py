"""Training runs that are recorded."""
