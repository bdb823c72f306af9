"""Slow looks at what tests let through: random configurations, real steps of every model, runs that are killed."""
