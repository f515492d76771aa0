"""The printer of Gluon: serial scans for Hopper's warp groups, from the same tiled kernels."""
