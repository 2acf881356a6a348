"""Pure metrics: how far the 4-bit model is from the 16-bit one, and what counts as too far.

metrics.py   KL, agreement and perplexity of two models on the same tokens
verdict.py   measurements and thresholds -> checks -> "pass" or "fail"
"""
