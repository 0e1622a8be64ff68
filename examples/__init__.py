"""Programs that use the package from a clone; they are not installed."""
