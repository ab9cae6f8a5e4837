"""Every run's values, and why. A config holds no logic."""
