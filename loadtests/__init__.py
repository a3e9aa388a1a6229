"""Load, soak and hostile clients, as commands that run against a server: see docs/reliability.md."""
