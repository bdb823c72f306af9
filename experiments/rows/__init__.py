"""Results as rows, JSON objects on lines of a file: reading, adding, where they come from, means and intervals."""
