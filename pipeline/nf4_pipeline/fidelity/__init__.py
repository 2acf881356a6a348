"""Pure metrics: how far the 4-bit model is from the 16-bit one, and what counts as too far.

token_scores.py two models' logits -> KL, agreement and likelihood of each token
bootstrap.py    how far a figure could be off by the luck of the text
metrics.py      scores of tokens -> figures with intervals, by domain and position
verdict.py      measurements and thresholds -> checks -> "pass" or "fail"
"""
