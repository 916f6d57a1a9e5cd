"""The parts of tools/load.py: the wire, the routes, how clients behave, the worker that is watched, the report.

Nothing here needs more than the standard library, so that it runs wherever a worker does.
"""
