"""Side-by-side ratios, never timed tests: `make bench` prints a table and writes a dated file."""
