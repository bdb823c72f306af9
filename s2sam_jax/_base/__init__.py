"""What all else is built on: pytrees, masks in a state, exact selection, structures, batches."""
