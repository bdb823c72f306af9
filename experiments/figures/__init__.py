"""Every figure, drawn from rows alone; a file for each kind of rows."""
