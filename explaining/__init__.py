"""Maps of what an answer depends on, and whether to believe them."""
