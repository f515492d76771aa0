"""The tuner: spaces of configurations, trials, the checks that a winner passes, what it writes."""
