"""The pictures, each a function of verification.json that returns a matplotlib figure.

Importing a module of this room imports matplotlib: do it inside the call that draws.
"""
