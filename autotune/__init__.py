"""The tuner searches configurations, times them, validates the winner, and writes artifacts."""
