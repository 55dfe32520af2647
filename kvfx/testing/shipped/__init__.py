"""What is compiled offline: per kernel room, names and launches on meta tensors."""
