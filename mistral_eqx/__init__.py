"""Mistral in JAX and Equinox.

```python
import mistral_eqx as mx

model, tokenizer = mx.load()
print(mx.generate(model, tokenizer, "To be, or not"))
```
"""

from .attention import Attention as Attention
from .cache import Cache as Cache
from .chat import Chat as Chat, chat as chat, encode_chat as encode_chat
from .config import ModelConfig as ModelConfig
from .decoding import (
    DecodeState as DecodeState,
    decode as decode,
    decode_step as decode_step,
    prefill as prefill,
)
from .devices import attention as _mesh_attention, experts as _mesh_experts  # noqa: F401
from .devices.sharding import shard as shard
from .files.adapted import (
    convert_adapter as convert_adapter,
    load_adapter as load_adapter,
    save_adapter as save_adapter,
)
from .files.checkpoint import load_model as load_model
from .files.export import convert as convert, save as save
from .files.heads import (
    load_classifier as load_classifier,
    load_embedder as load_embedder,
    save_classifier as save_classifier,
)
from .files.released import RELEASED as RELEASED
from .heads.classifier import Classifier as Classifier
from .heads.texts import classify as classify, embed as embed

# What stands in these modules takes the place of plain functions of the model.
from .kernels import (  # noqa: F401
    cpu as _cpu,
    cuda as _cuda,
    experts as _experts,
    grouped as _grouped,
    rings as _rings,
    tpu as _tpu,
)
from .kernels.quantized import quantize as quantize
from .learning.lora import add_lora as add_lora, merge_lora as merge_lora
from .learning.tokenizers import train_tokenizer as train_tokenizer
from .sampling import Sampling as Sampling
from .text import (
    beam_search as beam_search,
    generate as generate,
    load as load,
    score as score,
    stream as stream,
)
from .tokenizer import Tokenizer as Tokenizer, load_tokenizer as load_tokenizer
from .transformer import (
    Transformer as Transformer,
    TransformerBlock as TransformerBlock,
)
from .writer import Completion as Completion
