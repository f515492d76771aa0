"""Tuned configurations: their files, their machines, and the selection of one for a call."""
