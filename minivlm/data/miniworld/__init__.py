"""The embedded data set: drawn scenes whose truth is known."""
