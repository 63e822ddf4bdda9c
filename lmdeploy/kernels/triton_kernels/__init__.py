"""Kernels in Triton, for CUDA devices: one operator a file, `triton_set.py` names them. Nothing but `select.py` and tests imports this package,
and only when it is wanted: importing Triton takes a second and it may be missing. `reference.py` defines what each must compute.
"""
