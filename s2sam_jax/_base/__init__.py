"""The foundations: pytrees, the state rule, the clock, masks in a state, exact selection, structures."""
