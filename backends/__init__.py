"""The backends: lower an encoded graph to a library."""
