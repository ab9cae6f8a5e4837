"""Side by side with what a user would run instead: python -m bench.NAME [--json=FILE]."""
