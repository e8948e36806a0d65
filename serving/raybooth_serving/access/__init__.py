"""Who may call, and what is not made."""
