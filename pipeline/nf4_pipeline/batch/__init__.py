"""Many models and recipes, one after the other: `nf4 batch models.toml`.

queue.py    a TOML file -> jobs, each checked before the first begins
running.py  the jobs, one by one; a failure ends one of them
results.py  what came of each: JSON, and a table in Markdown
"""
