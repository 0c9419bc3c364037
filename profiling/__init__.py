"""What the kernels do to memory, counted and measured."""
