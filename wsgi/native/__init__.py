"""The worker's own API: /execute, /cancel, /health, /ready, /shutdown."""
