"""Model families as data, and the plan that engines interpret."""
