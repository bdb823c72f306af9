"""Every figure, drawn from rows alone, a kind of rows a file."""
