"""Manifest + verification -> a page and pictures that a person wants to look at. Pure.

Every number comes from `verification.json`; the manifest says which model this is, and how its
codes were chosen.

    page.py        report_page(): one HTML file that needs nothing else, not even a script
    pictures.py    pictures(): the same pictures as PNG, for the model card
    draw/          each picture, drawn once with matplotlib for both
    calibration.py how codes were chosen, in sentences
    kl_scale.py    published figures that a mean KL compares with
    snippets.py    the Python that card and page give to paste
    answers.py     what to show of two long answers, and where they part
    formatting.py  numbers and names -> text
    markdown.py    words of strangers in Markdown, as words
    model_card.py  model_card(): README.md of the artifact
    templates/     the page (Jinja2) and its style
"""
