"""Other programs' files, read and written: base shapes, optimizer groups, command lines."""
