"""How the embedded teacher was made: training text from packages, a tokenizer, a word list, two recipes.

`python -m examples.teacher_small --help` lists the commands; docs/data.md shows them in order.
"""
