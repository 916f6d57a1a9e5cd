"""A model ready to be used: the device, the sizes, `LLM`."""
