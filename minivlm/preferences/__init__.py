"""Preference pairs from the SFT model's own answers, and their reference log-probabilities."""
