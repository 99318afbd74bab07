"""What both trainers share around the algorithm itself."""
