"""Two files of one model compared."""
