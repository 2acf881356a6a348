"""What continuous integration shows of a plan, a build, a failure or a push. Pure.

report.py  what is said of each: Markdown, outputs for later steps, annotations
github.py  in the words of GitHub Actions
gitlab.py  in the files that GitLab CI reads
"""
