"""The steps of a whole run, each with its tracking: what the jobs call."""
