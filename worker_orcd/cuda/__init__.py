"""The CUDA engine's view of a plan: lowering, layouts, memory, launches."""
