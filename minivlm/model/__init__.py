"""Vision tower, projector, language model, decoding, export and checkpoints (torch and transformers only)."""
