"""NVIDIA's Nsight Compute and Nsight Systems on this library; docs/profiling.md explains them."""
