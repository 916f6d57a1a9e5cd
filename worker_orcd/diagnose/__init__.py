"""What a person asks about a file, a model or a machine."""
