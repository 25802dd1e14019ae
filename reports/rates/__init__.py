"""Points of bytes and accuracy, and the report that compares them."""
