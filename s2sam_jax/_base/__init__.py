"""What all else is built on: pytrees, the state rule, the clock, masks in a state, exact selection, structures."""
