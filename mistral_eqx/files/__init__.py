"""Folders of weights, in and out, in Mistral's format, in Hugging Face's, and as a GGUF.

A folder comes in; a model comes out whose arrays were read straight to their devices. A
model goes out as a folder that other programs read.

| module | what it is |
|---|---|
| `atomic.py` | folders that are whole or not there, with one writer at a time |
| `weights.py` | tensors in files of any format, read a slice at a time |
| `params.py` | the config of a model as Mistral's `params.json` has it |
| `config_json.py` | the config of a model as Hugging Face's `config.json` has it |
| `wrappers.py` | a vision encoder around the text model, and weights in FP8 |
| `huggingface.py` | Hugging Face's names of weights, and its order of rows |
| `gguf.py` | a GGUF file: its metadata, and its tensors |
| `llamacpp.py` | llama.cpp's names of weights, and the config in a GGUF |
| `gguf_tokenizer.py` | the tokenizer in a GGUF |
| `gguf_export.py` | a GGUF: written |
| `hub.py` | a model by its name on Hugging Face's hub |
| `folders.py` | which files of a folder hold a model |
| `vocabulary.py` | the files of tokenizers |
| `sandbox.py` | chat templates from strangers, rendered and bounded |
| `names.py` | the arrays of a model under the names of Mistral's files |
| `checkpoint.py` | a folder: opened, checked, loaded |
| `adapters.py` | LoRA adapters in Mistral's format and PEFT's: opened, and merged |
| `adapter_export.py` | the same: written |
| `adapted.py` | a model whose layers have an adapter: from files, and to files |
| `heads.py` | models that make labels or vectors |
| `quantizing.py` | weights that become eight or four bits while they are read |
| `export.py` | a folder: written, or converted to the other format |
| `released.py` | the shapes of released models, by name |
| `inspection.py` | what a folder holds, and what it needs on a mesh, without its weights |
"""
