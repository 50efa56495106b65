"""The command line: `python -m mistral_eqx COMMAND --help`.

Words from a shell come in; text, tables or a folder come out, and an exit status. Each
command is a module with its `HELP`, an `EXAMPLE`, `add_options(parser)` and
`run(options)`.

| module | what it is |
|---|---|
| `main.py` | the parser of all commands, and what happens to errors |
| `options.py` | options that several commands share |
| `terminal.py` | text from files, pipes and people; text to people |
| `demo.py` | continues the reference's three prompts |
| `interactive.py` | continues what you type |
| `generate.py` | continues a text |
| `chat.py` | a conversation |
| `score.py` | how probable a model finds texts |
| `evaluate.py` | how well a model predicts a text |
| `convert.py` | a model in the other format, or in another dtype |
| `inspect.py` | what is in a folder |
| `plan.py` | what a model needs of every device |
| `compiling.py` | the programs that `plan` compiles for chips that are not here |
| `bench.py` | how fast a model runs here |
| `measure.py` | the measurements that `bench` prints |
| `random_weights.py` | models of any shape for `bench`, with random weights |
| `train.py` | trains a model |
| `finetune.py` | trains a model further: an adapter, or all of it |
| `merge.py` | a model with adapters merged into it |
| `train_tokenizer.py` | trains a tokenizer |
"""
