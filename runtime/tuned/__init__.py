"""Tuned configurations: their files, the machines they are for, and which one serves a call."""
