"""What a data set gives away, with or without a network."""
