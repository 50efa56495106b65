"""This package beside its peers: the same weights, precision, prompts and threads.

    python tests/benchmarks/peers.py --shape tiny,135m,1b --dtype float32,bfloat16

`mistral_eqx`, `one_file_ref.py`, `transformers` (torch, sdpa) and llama.cpp (through
`llama-cpp-python` and a GGUF file written with `gguf`; left out where these two are not
installed) each run in a process of their own and take turns, so that all of them meet the
good and the bad minutes of the machine. A probe of the memory's read bandwidth takes its
turn as well. `tiny` is the embedded model; the other shapes get random weights. For Linux
alone.

What is timed, after everything has been compiled and warmed up:

- `decode`: greedy tokens of one row, from position 100 or so. `batch`: of `--rows`.
- `prefill`: a prompt of `--lengths` tokens, up to the logits that follow it.
- `train`: a step of 16 rows of 256 tokens in float32, AdamW with clipped gradients, of the
    embedded model.
- `lora`: a step of 2 such rows of the 135m shape in float32, with an adapter of rank 16 for
    all linear layers but the output; transformers' is peft's.

Nobody is timed before all agree. In float32 every engine writes the same greedy tokens, in
the check and while it is timed. In bfloat16 two orders of summation round differently:
there the logits behind a prompt must agree within 6 percent of their spread (root mean
squares), and where an engine's tokens first leave the package's, the two tokens must be
closer for the package than six times that error. The number of tokens up to there is told.

With `--dtype int8` the package holds the weights in eight bits with a scale for each row,
and llama.cpp in its Q8_0; the package's own bfloat16 takes turns with them. They agree as
in bfloat16.

Two engines do another computation past a window, which only `tiny` has: llama.cpp's llama
has no window, and the one-file reference sees a token more in prefill. They are checked
within the window. The one-file port makes the logits of every token of a prompt.
transformers and llama.cpp are driven token by token with an argmax, which is a little
faster than their own `generate`.

Standard output is a table in Markdown: medians of the rounds, the quartiles, and the median
of each round's ratio. The last column is what the package makes of the machine: in decode
the bytes that a token needs (`decode_bytes` of `mistral_eqx.apps.measure`), times tokens a
second, over what the probe read in the same round; in prefill the operations that it needs
(`prefill_flops`) a second. The embedded model stays in the processor's own caches.

On a GPU, torch and JAX share the card; llama.cpp runs where it was built for:

    python tests/benchmarks/peers.py --shape mistral-7b-v0.1 --dtype bfloat16 --rows 8,64 \\
        --lengths 2048,8192 --engines transformers
"""

import argparse
import copy
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
PROMPT = 96
TRAIN_ROWS, TRAIN_LENGTH, LORA_ROWS, LORA_RANK = 16, 256, 2, 16
PROBED = ("bandwidth", "bandwidth", None)
# Tokens of a prompt and behind it that fit the embedded model's window.
CHECK = (16, 40)
WHAT = ("decode", "batch", "prefill", "train", "lora")
# How far apart logits may be, in units of their own spread.
TOLERANCE = {"float32": 1e-3, "bfloat16": 6e-2, "int8": 6e-2}
GGUF_TYPES = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0"}
# Those that have eight bits; the second of them, to compare with.
IN_EIGHT_BITS = ("mistral_eqx", "mistral_eqx bfloat16", "llama.cpp")


@dataclasses.dataclass(frozen=True)
class Job:
    """What every engine is told."""

    shape: str
    dtype: str
    threads: int
    folder: str
    gguf: str
    steps: int
    prompts: list[list[int]]


class Package:
    """mistral_eqx."""

    name = "mistral_eqx"
    window = True
    does = WHAT
    quantize = "int8"

    def __init__(self, job: Job):
        import jax

        import mistral_eqx as mx

        self.job, self.mx, self.key = job, mx, jax.random.key(0)
        options = {"dtype": job.dtype}
        if job.dtype == "int8":
            options = {"dtype": "bfloat16", "quantize": self.quantize}
        self.model = jax.block_until_ready(mx.load_model(job.folder, **options))

    def logits(self, tokens):
        import numpy as np

        _, logits = self.mx.prefill(self.model, [tokens])
        return np.asarray(logits[0])

    def greedy(self, prompt, n):
        from mistral_eqx.generation import generate

        (row,) = generate(self.model, [prompt], max_tokens=n, key=self.key)
        return row.tokens

    def decode(self, rows):
        """Times the program that `stream` and `generate` call for each block."""
        import jax.numpy as jnp

        from mistral_eqx.generation import decode

        prompts = [prompt[:PROMPT] for prompt in self.job.prompts[:rows]]
        steps, first = self.job.steps, self.job.steps // 2

        def prepare():
            cache, logits = self.mx.prefill(self.model, prompts, max_tokens=first + steps)
            state = self.mx.DecodeState.start(
                self.model, cache, logits, max_tokens=first + steps + 1, key=self.key
            )
            state, choice = decode(self.model, state, jnp.int32(first))
            choice.tokens.block_until_ready()
            return state

        def run(state):
            _, choice = decode(self.model, state, jnp.int32(steps))
            return choice.tokens[:, :steps].tolist()

        return prepare, run, steps * len(prompts)

    def prefill(self, length):
        import jax

        prompt = self.job.prompts[0][:length]
        run = lambda _: jax.block_until_ready(self.mx.prefill(self.model, [prompt])) and 0
        return (lambda: None), run, length

    def train(self, _):
        import jax
        import jax.numpy as jnp

        return self._train(jax.tree.map(jnp.copy, self.model), TRAIN_ROWS)

    def lora(self, _):
        model = self.mx.add_lora(self.model, rank=LORA_RANK, key=self.key)
        return self._train(model, LORA_ROWS)

    def _train(self, model, rows):
        import jax
        import jax.numpy as jnp

        from mistral_eqx.learning.batches import Batch
        from mistral_eqx.learning.training import make_optimizer, start, train_step

        optimizer = make_optimizer(learning_rate=1e-3, steps=10**6, warmup=0)
        frozen, self.state = start(model, optimizer)
        tokens = training_tokens(self.model.config.vocab_size, rows)

        def run(_):
            batch = Batch(jnp.asarray(tokens))
            made = train_step(frozen, self.state, batch, optimizer)
            self.state, outcome = jax.block_until_ready(made)
            return float(outcome.loss)

        return (lambda: None), run, rows * TRAIN_LENGTH


class InBfloat16(Package):
    """The package's own bfloat16, where it is measured in eight bits."""

    name = "mistral_eqx bfloat16"
    quantize = None


class OneFile:
    """one_file_ref.py, filled with the package's arrays."""

    name = "one_file_ref.py"
    window = False
    does = ("decode", "prefill")

    def __init__(self, job: Job):
        import equinox as eqx
        import jax

        import mistral_eqx as mx
        import one_file_ref

        model = mx.load_model(job.folder, dtype=job.dtype)
        names = {field.name for field in dataclasses.fields(one_file_ref.ModelArgs)}
        from mistral_eqx.files.params import config_to_params

        params = config_to_params(model.config)
        args = {name: params[name] for name in names if name in params}
        skeleton = eqx.filter_eval_shape(
            one_file_ref.Transformer,
            one_file_ref.ModelArgs(**args),
            key=jax.random.key(0),
        )
        leaves, _ = jax.tree_util.tree_flatten_with_path(model)
        found = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
        # It knows no tied embeddings: the same array is given twice.
        found.setdefault(".output.weight", found[".tok_embeddings.weight"])
        leaves, treedef = jax.tree_util.tree_flatten_with_path(skeleton)
        self.model = treedef.unflatten(
            [found[jax.tree_util.keystr(path)] for path, _ in leaves]
        )
        self.job = job

    def _read(self, prompt, room):
        import jax.numpy as jnp

        cache = self.model.empty_cache(1, len(prompt) + room)
        positions = jnp.arange(len(prompt))
        return self.model.forward(jnp.asarray([prompt]), positions, cache)

    def _write(self, state, start, n):
        """As its own `generate` does."""
        import jax
        import jax.numpy as jnp
        import numpy as np

        logits, cache = state
        made = []
        for position in range(start, start + n):
            logprobs = jax.nn.log_softmax(logits, axis=-1)
            token = jnp.argmax(logprobs[:, -1, :], axis=-1)
            made.append(token[:, None])
            logits, cache = self.model.forward(token[:, None], jnp.array([position]), cache)
        return np.asarray(jnp.concatenate(made, 1))[0].tolist(), (logits, cache)

    def logits(self, tokens):
        import numpy as np

        logits, _ = self._read(tokens, 0)
        return np.asarray(logits[0, -1])

    def greedy(self, prompt, n):
        return self._write(self._read(prompt, n), len(prompt), n)[0]

    def decode(self, rows):
        steps, first = self.job.steps, self.job.steps // 2
        state = self._read(self.job.prompts[0][:PROMPT], first + steps)
        _, state = self._write(state, PROMPT, first)
        # Its bfloat16 on a CPU is so slow that a part of the steps has to do.
        steps //= 4
        run = lambda _: [self._write(state, PROMPT + first, steps)[0]]
        return (lambda: None), run, steps

    def prefill(self, length):
        import jax

        prompt = self.job.prompts[0][:length]
        run = lambda _: jax.block_until_ready(self._read(prompt, 0)) and 0
        return (lambda: None), run, length


class Transformers:
    """transformers on torch."""

    name = "transformers"
    window = True
    does = WHAT

    def __init__(self, job: Job):
        import torch
        from transformers import MistralForCausalLM

        torch.set_num_threads(job.threads)
        self.job, self.torch = job, torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = MistralForCausalLM.from_pretrained(
            job.folder, dtype=getattr(torch, job.dtype), attn_implementation="sdpa"
        )
        self.model.eval().to(self.device)

    def _read(self, prompts):
        from transformers import DynamicCache

        with self.torch.inference_mode():
            out = self.model(
                self.torch.tensor(prompts, device=self.device),
                past_key_values=DynamicCache(config=self.model.config),
                logits_to_keep=1,
            )
        return out.logits[:, -1], out.past_key_values

    def _write(self, state, n):
        logits, cache = state
        made = []
        with self.torch.inference_mode():
            for _ in range(n):
                token = logits.argmax(-1, keepdim=True)
                made.append(token)
                out = self.model(token, past_key_values=cache)
                logits = out.logits[:, -1]
        return self.torch.cat(made, 1).tolist(), (logits, cache)

    def logits(self, tokens):
        return self._read([tokens])[0][0].float().cpu().numpy()

    def greedy(self, prompt, n):
        return self._write(self._read([prompt]), n)[0][0]

    def decode(self, rows):
        steps = self.job.steps
        state = self._read([prompt[:PROMPT] for prompt in self.job.prompts[:rows]])
        _, state = self._write(state, steps // 2)
        run = lambda state: self._write(state, steps)[0]
        # The cache is written to.
        return (lambda: copy.deepcopy(state)), run, steps * rows

    def prefill(self, length):
        prompt = self.job.prompts[0][:length]
        run = lambda _: self._read([prompt])[0].isnan().any().item()
        return (lambda: None), run, length

    def train(self, _):
        return self._train(copy.deepcopy(self.model).train(), TRAIN_ROWS)

    def lora(self, _):
        import peft

        options = {"r": LORA_RANK, "lora_alpha": 2 * LORA_RANK}
        config = peft.LoraConfig(**options, target_modules="all-linear")
        model = copy.deepcopy(self.model).train()
        return self._train(peft.get_peft_model(model, config), LORA_ROWS)

    def _train(self, model, rows):
        torch = self.torch
        trained = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.ndim > 1]
        norms = [p for p in trained if p.ndim == 1]
        optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": norms, "weight_decay": 0.0}],
            lr=1e-3,
            betas=(0.9, 0.95),
            weight_decay=0.1,
        )
        tokens = training_tokens(model.config.vocab_size, rows)
        tokens = torch.tensor(tokens, device=self.device).long()

        def run(_):
            logits = model(tokens[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), tokens[:, 1:].flatten()
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            return loss.item()

        return (lambda: None), run, rows * TRAIN_LENGTH


class LlamaCpp:
    """llama.cpp, with a cache of its default float16, or float32 for float32."""

    name = "llama.cpp"
    window = False
    does = ("decode", "prefill")

    def __init__(self, job: Job):
        import llama_cpp

        self.job = job
        kind = 0 if job.dtype == "float32" else 1  # GGML_TYPE_F32, GGML_TYPE_F16
        self.model = llama_cpp.Llama(
            job.gguf,
            n_ctx=len(job.prompts[0]) + 256,
            n_batch=len(job.prompts[0]),
            n_ubatch=len(job.prompts[0]),
            n_threads=job.threads,
            n_threads_batch=job.threads,
            type_k=kind,
            type_v=kind,
            verbose=False,
        )

    def _logits(self):
        import numpy as np

        pointer = self.model._ctx.get_logits()
        return np.ctypeslib.as_array(pointer, shape=(self.model.n_vocab(),))

    def _read(self, tokens):
        self.model.reset()
        self.model.eval(tokens)

    def _write(self, n):
        made = []
        for _ in range(n):
            made.append(int(self._logits().argmax()))
            self.model.eval(made[-1:])
        return made

    def logits(self, tokens):
        self._read(tokens)
        return self._logits().copy()

    def greedy(self, prompt, n):
        self._read(prompt)
        return self._write(n)

    def decode(self, rows):
        steps = self.job.steps
        prompt = self.job.prompts[0][:PROMPT]
        self._read(prompt)
        prompt = prompt + self._write(steps // 2)

        return (lambda: self._read(prompt)), (lambda _: [self._write(steps)]), steps

    def prefill(self, length):
        prompt = self.job.prompts[0][:length]
        run = lambda _: (self._read(prompt), self._logits()) and 0
        return (lambda: None), run, length


class Probe:
    """Reads half a gigabyte again and again: the fastest way known is a matrix times a
    vector."""

    name = "probe"
    does = ("bandwidth",)

    def __init__(self, job: Job):
        import jax
        import jax.numpy as jnp

        self.matrix, self.vector = jnp.ones((2**13, 2**14)), jnp.ones(2**14)
        self.product = jax.jit(jnp.dot)

    def bandwidth(self, _):
        def run(_):
            self.product(self.matrix, self.vector).block_until_ready()

        return (lambda: None), run, self.matrix.nbytes


ENGINES = {
    cls.name: cls for cls in (Package, InBfloat16, OneFile, Transformers, LlamaCpp, Probe)
}


def training_tokens(vocab_size, rows):
    import numpy as np

    shape = (rows, TRAIN_LENGTH + 1)
    return np.random.default_rng(1).integers(0, vocab_size, shape).astype(np.int32)


def serve(name: str, job: Job, pipe) -> None:
    """An engine's process: answers calls of its methods, and `turn`."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.threads])
    os.environ["OMP_NUM_THREADS"] = str(job.threads)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # a GPU is shared
    sys.path.insert(0, str(ROOT))
    prepared = {}

    def turn(label, seconds):
        """Runs until that much time is measured; the median of the units a second, and
        the last result."""
        prepare, run, units = prepared[label]
        spent = []
        while sum(spent) < seconds:
            state = prepare()
            start = time.perf_counter()
            result = run(state)
            spent.append(time.perf_counter() - start)
        return units / statistics.median(spent), result

    def warm_up(label, method, argument):
        """The result of the first run, which compiles."""
        start = time.perf_counter()
        prepared[label] = getattr(engine, method)(argument)
        prepare, run, _ = prepared[label]
        result = run(prepare())
        return result, time.perf_counter() - start

    try:
        engine = ENGINES[name](job)
        pipe.send((True, None))
        while True:
            method, *arguments = pipe.recv()
            method = {"turn": turn, "warm_up": warm_up}.get(method) or getattr(
                engine, method
            )
            pipe.send((True, method(*arguments)))
    except Exception:
        pipe.send((False, traceback.format_exc()))


class Worker:
    """The other end of the pipe."""

    def __init__(self, name: str, job: Job):
        self.name, self.cls = name, ENGINES[name]
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(name, job, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self._answer()

    def __call__(self, *call):
        self.pipe.send(call)
        return self._answer()

    def _answer(self):
        try:
            fine, answer = self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self.name} died; was there memory enough?") from None
        if not fine:
            raise RuntimeError(f"{self.name} failed:\n{answer}")
        return answer

    def close(self):
        self.process.terminate()
        self.process.join()


def write_model(shape: str, dtype: str, folder: str) -> None:
    """Random weights in Hugging Face's format, or the embedded model's."""
    dtype = "bfloat16" if dtype == "int8" else dtype
    sys.path.insert(0, str(ROOT))
    import jax

    import mistral_eqx as mx
    from mistral_eqx import RELEASED
    from mistral_eqx.text import TINY_MISTRAL

    if shape == "tiny":
        mx.convert(TINY_MISTRAL, folder, format="huggingface", dtype=dtype)
        return
    model = mx.Transformer(RELEASED[shape], dtype=dtype, key=jax.random.key(0))
    mx.save(model, folder, format="huggingface", max_shard_size="100GB")


def write_gguf(folder: str, path: str, dtype: str) -> None:
    """The weights of a folder as llama.cpp reads them. It ignores a window."""
    sys.path.insert(0, str(ROOT))
    import mistral_eqx as mx

    mx.convert(folder, path, dtype=GGUF_TYPES[dtype])


def in_a_process(function, *arguments) -> None:
    """So that its memory is given back."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{function.__name__} failed.")


def say(*words) -> None:
    print(*words, file=sys.stderr, flush=True)


def check(workers: dict, job: Job) -> dict[str, int]:
    """That all write the same. Returns how many tokens of each engine are the package's."""
    import numpy as np

    n_prompt, n = CHECK
    prompt = job.prompts[0][:n_prompt]
    ours = workers[Package.name]
    expected, reference = ours("greedy", prompt, n), ours("logits", prompt)
    agreed = {}
    for name, worker in workers.items():
        if name in (Package.name, Probe.name):
            continue
        error = np.std(worker("logits", prompt) - reference) / np.std(reference)
        if not error < TOLERANCE[job.dtype]:
            raise RuntimeError(f"{name}'s logits differ by {error:.1e} of their spread.")
        ties = 0.0 if job.dtype == "float32" else 6 * float(error)
        tokens = worker("greedy", prompt, n)
        agreed[name] = compare(ours, name, prompt, expected, tokens, ties)
        say(f"  {name}: {agreed[name]} of {n} tokens equal, logits within {error:.1e}")
    return agreed


def compare(ours, name: str, prompt, expected, tokens, ties: float) -> int:
    """How many tokens are equal up to the first that is not; it must be a tie."""
    for i, (theirs, token) in enumerate(zip(tokens, expected, strict=True)):
        if theirs != token:
            logits = ours("logits", prompt + expected[:i])
            gap = (logits[token] - logits[theirs]) / logits.std()
            if gap > ties:
                raise RuntimeError(
                    f"{name} chose {theirs} and the package {token} as token {i}, which "
                    f"are {gap:.1e} of the logits' spread apart: not the same model."
                )
            return i
    return len(expected)


def wait_for_quiet(seconds: float) -> bool:
    """Waits until nothing else runs on the machine, for so long at most. The threads of
    the last turn go to sleep in the meantime."""

    def idle():
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        return int(fields[3]) + int(fields[4]), sum(map(int, fields[:8]))

    stop = time.perf_counter() + seconds
    while True:
        before = idle()
        time.sleep(0.1)
        after = idle()
        quiet = after[0] - before[0] > 0.8 * (after[1] - before[1])
        if quiet or time.perf_counter() > stop:
            return quiet


def measure(job: Job, engines: list[str], what: dict, options) -> dict:
    """Starts the engines, checks them, and lets them take turns."""
    workers = {}
    try:
        for name in engines:
            say(f"  {name} starts")
            workers[name] = Worker(name, job)
        agreed = check(workers, job)
        turns, results = [], {}
        for label, (w, method, argument) in {"bandwidth": PROBED, **what}.items():
            for name, worker in workers.items():
                if w in worker.cls.does:
                    result, seconds = worker("warm_up", label, method, argument)
                    results[label, name] = result
                    turns.append((label, name))
                    say(f"  {label}, {name}: warm after {seconds:.1f} s")
        compare_results(workers, job, results)
        speeds = {label: {} for label, _ in turns}
        for label, name in turns:
            speeds[label][name] = []
        disturbed = 0
        for i in range(options.rounds):
            for label, name in turns:
                disturbed += not wait_for_quiet(options.patience)
                speed, result = workers[name]("turn", label, options.seconds)
                if label not in ("train", "lora") and result != results[label, name]:
                    raise RuntimeError(f"{name} wrote other tokens than at first.")
                speeds[label][name].append(speed)
            told = (
                f"{w} {name} {v[-1]:.4g}" for w in speeds for name, v in speeds[w].items()
            )
            say(f"  round {i + 1}: {', '.join(told)}")
        if disturbed:
            total = options.rounds * len(turns)
            say(f"  Something else ran on the machine in {disturbed} of {total} turns.")
    finally:
        for worker in workers.values():
            worker.close()
    return {
        "shape": job.shape,
        "dtype": job.dtype,
        "threads": job.threads,
        "agreed": agreed,
        "speeds": speeds,
    }


def compare_results(workers, job: Job, results) -> None:
    """That the timed tokens, and the losses, are equal as well."""
    for (label, name), rows in results.items():
        if not isinstance(rows, list) or name == Package.name:
            continue
        if job.shape == "tiny" and not workers[name].cls.window:
            continue
        expected = results[label, Package.name]
        equal = sum(a[: len(b)] == b for a, b in zip(expected, rows, strict=True))
        if equal < len(rows) and job.dtype == "float32":
            raise RuntimeError(f"{name} wrote other tokens than the package in {label}.")
        if equal < len(rows):
            say(f"  {label}, {name}: {equal} of {len(rows)} rows equal in bfloat16")
    for what in ("train", "lora"):
        losses = {name: loss for (label, name), loss in results.items() if label == what}
        if losses and max(losses.values()) - min(losses.values()) > 1e-4:
            raise RuntimeError(f"The first losses differ: {losses}.")


def table(measured: list[dict]) -> str:
    """Markdown, one line for each thing measured."""
    timed = {name for m in measured for speeds in m["speeds"].values() for name in speeds}
    engines = [name for name in ENGINES if name in timed - {Probe.name}]
    peers = [name for name in engines if name != Package.name]
    head = ["tokens/s", *engines, *(f"times {name}" for name in peers), "of the hardware"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for m in measured:
        (probe,) = m["speeds"]["bandwidth"].values()
        for label, speeds in m["speeds"].items():
            if label == "bandwidth":
                continue
            ours = speeds[Package.name]
            cells = [f"{m['shape']} {m['dtype']}, {label}"]
            cells += [spread(speeds[name]) if name in speeds else "" for name in engines]
            for name in peers:
                ratios = [a / b for a, b in zip(ours, speeds.get(name, []))]
                cells.append(f"{statistics.median(ratios):.2f}" if ratios else "")
            needs, share = m["needs"].get(label, 0), ""
            if label.startswith("prefill"):
                share = f"{statistics.median(ours) * needs / 1e9:,.0f} GFLOP/s"
            elif needs and m["shape"] != "tiny":
                shares = [a * needs / b for a, b in zip(ours, probe)]
                share = f"{statistics.median(shares):.0%} of the bandwidth"
            lines.append(f"| {' | '.join([*cells, share])} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """The median and the quartiles."""
    digits = lambda x: f"{x:,.0f}" if x >= 100 else f"{x:.1f}"
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive")
        if len(values) > 1
        else values * 3
    )
    return f"{digits(middle)} ({digits(low)} to {digits(high)})"


def needs(config, dtype: str, what: dict, steps: int) -> dict[str, float]:
    """The bytes for each token of decode, and the operations for each of prefill."""
    import equinox as eqx
    import jax

    import mistral_eqx as mx
    from mistral_eqx.apps.measure import decode_bytes, prefill_flops

    make = eqx.filter_eval_shape
    floats = jax.numpy.dtype("bfloat16" if dtype == "int8" else dtype)
    skeleton = make(mx.Transformer, config, dtype=floats, key=jax.random.key(0))
    if dtype == "int8":
        skeleton = make(mx.quantize, skeleton, dtype)
    found = {}
    for label, (_, method, n) in what.items():
        if method == "decode":
            context = PROMPT + steps  # half way of what is timed
            found[label] = decode_bytes(skeleton, batch=n, context=context) / n
        elif method == "prefill":
            found[label] = prefill_flops(config, tokens=n) / n
    return found


def main() -> int:
    shapes = ("tiny", "135m", "1b", "mistral-7b-v0.1")
    engines = [name for name in ENGINES if name != Probe.name]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def several(choices):
        def parse(text):
            chosen = text.split(",")
            if wrong := [name for name in chosen if name not in choices]:
                raise argparse.ArgumentTypeError(
                    f"{wrong[0]!r} is none of {', '.join(choices)}"
                )
            return chosen

        return parse

    def number(text):
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
        return int(text)

    numbers = lambda text: [number(part) for part in text.split(",")]
    add = parser.add_argument
    add("--shape", type=several(shapes), default=["tiny", "135m", "1b"], metavar="A,B,...")
    add(
        "--dtype",
        type=several(tuple(TOLERANCE)),
        default=["float32", "bfloat16"],
        metavar="A,B,...",
    )
    add("--what", type=several(WHAT), default=list(WHAT), metavar="A,B,...")
    add("--rows", type=numbers, default=[8], metavar="N,N,...", help="of batch (8)")
    add("--lengths", type=numbers, default=[512], metavar="N,N,...", help="prefill's (512)")
    add("--engines", type=several(engines), default=engines, metavar="A,B,...")
    add("--rounds", type=number, default=7, metavar="N", help="turns of each (7)")
    add("--seconds", type=float, default=1.0, help="of each engine's turn, at least (1)")
    add("--patience", type=float, default=2.0, help="wait so long for a quiet machine (2)")
    add("--threads", type=number, default=len(os.sched_getaffinity(0)), metavar="N")
    add("--json", type=Path, metavar="FILE", help="where to write every single figure")
    options = parser.parse_args()
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"There is no folder for {options.json}.")
    # Killed, it takes its processes and its gigabytes of weights along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.path.insert(0, str(ROOT))
    wanted = {Package.name, InBfloat16.name, *options.engines}
    chosen = [name for name in engines if name in wanted]
    for module in ("llama_cpp", "gguf"):
        if LlamaCpp.name in chosen and importlib.util.find_spec(module) is None:
            say(f"llama.cpp is left out: {module} is not installed.")
            chosen.remove(LlamaCpp.name)
    measured = []
    try:
        for shape in options.shape:
            for dtype in options.dtype:
                if (what := things(options, shape, dtype)) != {}:
                    say(f"{shape} {dtype}")
                    measured.append(one(shape, dtype, what, chosen, options))
                    say(table(measured[-1:]))
    except RuntimeError as error:
        say(error)
        return 1
    finally:
        # What was measured before something went wrong is not lost.
        if options.json is not None:
            options.json.write_text(json.dumps(measured, indent=1) + "\n")
        if measured:
            print(table(measured))
    return 0


def things(options, shape: str, dtype: str) -> dict[str, tuple]:
    """What to measure: under its name in the table, what it is, an engine's method, and
    the method's argument."""
    found = {}
    if "decode" in options.what:
        found["decode"] = ("decode", "decode", 1)
    if "batch" in options.what:
        found |= {f"batch of {n}": ("batch", "decode", n) for n in options.rows}
    if "prefill" in options.what:
        found |= {f"prefill of {n}": ("prefill", "prefill", n) for n in options.lengths}
    if "train" in options.what and (shape, dtype) == ("tiny", "float32"):
        found["train"] = ("train", "train", None)
    if "lora" in options.what and (shape, dtype) == ("135m", "float32"):
        found["lora"] = ("lora", "lora", None)
    return found


def one(shape: str, dtype: str, what: dict, engines: list[str], options) -> dict:
    """Everything of one model in one precision."""
    import numpy as np

    from mistral_eqx import RELEASED
    from mistral_eqx.files.folders import read_config
    from mistral_eqx.text import TINY_MISTRAL

    config = read_config(TINY_MISTRAL) if shape == "tiny" else RELEASED[shape]
    steps = 64 if shape == "tiny" else 32 if config.dim < 2048 else 16
    rows, length = max(1, *options.rows), max(PROMPT, *options.lengths)
    prompts = np.random.default_rng(0).integers(3, config.vocab_size, (rows, length))
    with tempfile.TemporaryDirectory() as name:
        folder, gguf = f"{name}/model", f"{name}/model.gguf"
        in_a_process(write_model, shape, dtype, folder)
        if LlamaCpp.name in engines:
            in_a_process(write_gguf, folder, gguf, dtype)
        job = Job(shape, dtype, options.threads, folder, gguf, steps, prompts.tolist())
        able = set(engines) - {InBfloat16.name}
        able = IN_EIGHT_BITS if dtype == "int8" else able
        engines = [name for name in engines if name in able]
        measured = measure(job, [*engines, Probe.name], what, options)
    return measured | {"needs": needs(config, dtype, what, steps)}


if __name__ == "__main__":
    sys.exit(main())
