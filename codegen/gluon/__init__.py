"""The printer of Gluon, for Hopper: scans, and kernels of chunks, from the same tiled kernels."""
