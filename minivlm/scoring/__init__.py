"""Pure scoring: answer extraction, metrics, statistics. No Ray, no configuration."""
