"""Sequences on an engine: the scheduler, the loop, jobs and their text."""
