"""HTTP in, HTTP out: OpenAI's image API."""
