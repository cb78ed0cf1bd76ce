"""From what a user brings to what the trainers read."""
