"""The runtime: torch ops, engine choice, decoding, layers."""
