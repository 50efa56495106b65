"""Training. A model and two streams of token ids come in; a trained model comes out.

| module | what it is |
|---|---|
| `tokenizers.py` | a tokenizer learnt from a text |
| `checkpoints.py` | the state of a run in a file |
| `batches.py` | what a step learns from: slices of a long text, or short examples packed |
| `examples.py` | a file of texts or conversations, checked line by line |
| `lora.py` | layers that learn two thin matrices and keep their weight |
| `training.py` | the loss, and one step down its gradient |
| `fitting.py` | the loop around a step, which goes on after it was killed |
"""
