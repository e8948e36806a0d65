"""Commands of the `raybooth` program; each module has `register(subparsers)`."""
