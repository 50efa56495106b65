"""Other ends of a model than the next token: a vector for a text, or a label.

Texts come in; vectors or labels go out. The model below is the same.

| module | what it is |
|---|---|
| `classifier.py` | what is made of the last layer's output: one vector a text, and labels |
| `texts.py` | the same for texts of any lengths |
"""
