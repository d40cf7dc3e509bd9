"""Data: read, deal to clients, tokenise once, and serve each client its own examples. Nothing here imports torch."""
