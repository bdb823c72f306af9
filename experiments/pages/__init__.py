"""Pages of results, made from rows alone; a file for each kind of rows."""
