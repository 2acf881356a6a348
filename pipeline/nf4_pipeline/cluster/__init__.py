"""Work on many machines, by an engine that schedules it. Nothing here knows what the work is.

ray_tasks.py     calls as tasks of a Ray cluster: resources claimed, lost workers' calls tried again
seen_folders.py  what a task's node must see of the folders of the host of the command

Ray is an extra (`nf4-pipeline[ray]`), and is imported where it is asked for.
"""
