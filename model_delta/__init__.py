"""The shared language about models: what a version is, how one becomes another, who vouches for it, who should run it.

Nothing here imports another Atoll package, opens a socket, or reads a clock.
"""
