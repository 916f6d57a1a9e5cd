"""Types of pyx/worker_orcd/_expert_nodes.pyx: the launches of a mixture of experts, made by cuda/launches.py alone."""

from worker_orcd._nodes import Node

class RouteNode(Node):
    """The experts of every row, and the lists of the decode rows and of the prompt rows."""

class ExpertProductNode(Node):
    """Products of every row and slot with matrices of the expert in that slot."""

class ExpertSumNode(Node):
    """The slots' results of every row, weighted and added in slot order."""
