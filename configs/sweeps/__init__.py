"""Named arms for sweep.py --arms=FILE."""
