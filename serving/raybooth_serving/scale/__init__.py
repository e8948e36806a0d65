"""Many replicas and several bases behind one gateway."""
