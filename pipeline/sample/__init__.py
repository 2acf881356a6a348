"""The bundled sample: a tiny trained Falcon and 50 questions it was never trained on.

``scripts/train_sample.py`` makes both. The questions measure what quantization costs: ask
them before and after, and compare how many are answered right.
"""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
"""The checkpoint folder, in the layout of a Hub snapshot."""

QUESTIONS: Path = Path(__file__).parent / "questions.jsonl"
"""One JSON object per line: ``prompt`` is the full text to feed, ``expect`` the answer."""
