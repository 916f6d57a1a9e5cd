"""Model files: parsed, checked, identified."""
