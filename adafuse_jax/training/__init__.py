"""Loss, optimiser, checkpoints and the training loop."""
