"""Training. A model and two streams of token ids come in; a trained model comes out.

| module | what it is |
|---|---|
| `tokenizers.py` | a tokenizer learnt from a text |
| `checkpoints.py` | the state of a run in a file |
| `training.py` | the loss, one step, and a loop that goes on after it was killed |
"""
