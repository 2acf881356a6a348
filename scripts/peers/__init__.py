"""What `scripts/compare_peers.py` is made of.

contestants.py  who takes part: packages, settings, and what each needs
running.py      environments, and steps run in them with their time and memory
evaluation.py   decoded weights against the 16-bit model; the same for everybody
table.py        results -> the table of docs/comparison.md
drivers/        one program for each peer, run in the peer's own environment
"""
