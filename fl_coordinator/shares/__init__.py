"""What is computed on shares, without anybody seeing an update."""
