"""Side-by-side ratios, never timed tests: `make bench` prints a table and writes a dated file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "platform"))  # also where nothing is installed
