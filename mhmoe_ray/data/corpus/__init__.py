"""Real text for a first run, from packages that install by name."""
