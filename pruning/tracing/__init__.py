"""How one observed forward pass becomes channel labels: the tracer, and a rule for each kind of operation."""
