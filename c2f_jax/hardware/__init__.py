"""What a compiled program costs on a slice of accelerators."""
