"""What leaves the endpoint: picture files, and receipts that make them again."""
