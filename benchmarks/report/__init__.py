"""What records say: entries, tables, pictures, and the page of results."""
