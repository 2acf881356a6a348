"""The bundled sample: a tiny trained Falcon, 50 questions and a text that it was not trained on.

``scripts/sample/train_sample.py`` makes all three. The questions and the text measure what
quantization costs: the model knows nothing but its own small world, so any other text would
surprise it alike before and after.
"""

from pathlib import Path

SAMPLE_REPO: str = "nf4-pipeline/sample"
"""What manifest and records call it; no repo of the Hub."""

MODEL_DIR: Path = Path(__file__).parent / "model"
"""The checkpoint folder, in the layout of a Hub snapshot."""

QUESTIONS: Path = Path(__file__).parent / "questions.jsonl"
"""One JSON object per line: ``prompt`` is the full text to feed, ``expect`` the answer."""

TEXT: Path = Path(__file__).parent / "text.txt"
"""Documents of its own kind, each closed by the token that ends a text."""
