"""A byte-level language model whose blocks are dense, MoE, PKM or UltraMemV2.

The four kinds are matched in active parameters, the sparse three in total parameters too, and are
trained by one trainer on real text, so that their validation losses can be compared.
"""
