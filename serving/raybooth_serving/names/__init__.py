"""What the names of a request mean."""
