"""Training: losses, the stage table, the DeepSpeed engine and the Ray Train loop."""
