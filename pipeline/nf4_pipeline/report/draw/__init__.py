"""The pictures, each a function of a verification that returns a matplotlib figure.

Each is drawn for a page of some 800 px, or narrow, for a phone.

canvas.py   how a picture looks, and how it becomes PNG or SVG
sizes.py    where the bytes go
layers.py   where the error comes from
kl.py       how far the predictions move
domains.py  what kind of text suffers

Importing a module of this room imports matplotlib: do it inside the call that draws.
"""
