"""``sparsify``, and the building blocks of sparse methods."""
