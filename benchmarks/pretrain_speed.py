"""Training speed and memory on CPU, ours against transformers + torch, paired: A B A B … in fresh processes of one run.

  python benchmarks/pretrain_speed.py [--rounds=3] [--steps=6]

Both train the same shape (dim 288, 6 layers, 6 heads, vocabulary 32,000) on 16 sequences of 256 random tokens in float32,
with AdamW and clipping; theirs with scaled_dot_product_attention and fused AdamW. The ratio is that of the medians.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

BATCH, LENGTH, VOCABULARY, DIM, LAYERS, HEADS, HIDDEN = 16, 256, 32_000, 288, 6, 6, 768


def measure(step, steps: int) -> dict[str, float]:
    """Runs one step to warm up, then `steps`; step(tokens) returns the loss as a float."""
    random = np.random.default_rng(0)
    batches = [random.integers(0, VOCABULARY, (BATCH, LENGTH + 1)) for _ in range(steps + 1)]
    step(batches[0])
    before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    for batch in batches[1:]:
        loss = step(batch)
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        'tokens_per_second': steps * BATCH * LENGTH / seconds,
        'tokens_per_cpu_second': steps * BATCH * LENGTH / (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime),
        'peak_gb': after.ru_maxrss * 1024 / 1e9,
        'loss': loss,
    }


def ours(steps: int) -> dict[str, float]:
    """The pretraining step of `stages/pretrain.py`."""
    import jax

    from llama2_jax.config import ModelConfig
    from llama2_jax.mesh import MeshConfig, set_mesh
    from llama2_jax.stages import pretrain
    from llama2_jax.train.devices import to_mesh

    model = ModelConfig(VOCABULARY, DIM, LAYERS, HEADS, HEADS, DIM // HEADS, HIDDEN, LENGTH)
    config = pretrain.PretrainConfig(model=model, batch_size=BATCH, length=LENGTH)
    mesh = set_mesh(MeshConfig())
    _, init, train_step = pretrain.build(config, config.compute.on(jax.default_backend()))
    state = init()

    def step(tokens):
        nonlocal state
        batch = {'tokens': tokens.astype(np.int32), 'segment_ids': np.ones(tokens.shape, np.int32)}
        state, metrics = train_step(state, to_mesh(batch, mesh))
        return float(metrics['loss'])

    return measure(step, steps)


def theirs(steps: int) -> dict[str, float]:
    """LlamaForCausalLM in torch."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=DIM, intermediate_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        max_position_embeddings=LENGTH, rms_norm_eps=1e-5, attn_implementation='sdpa', use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, (0.9, 0.95), 1e-5, 0.1, fused=True)

    def step(tokens):
        ids = torch.from_numpy(tokens)
        logits = model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return measure(step, steps)


def main() -> None:
    """Alternates the two and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--steps', type=int, default=6)
    parser.add_argument('--only', choices=['ours', 'theirs'])
    options = parser.parse_args()
    if options.only:
        print(json.dumps({'ours': ours, 'theirs': theirs}[options.only](options.steps)))
        return
    results = {'ours': [], 'theirs': []}
    for _ in range(options.rounds):
        for name, rows in results.items():
            command = [sys.executable, __file__, f'--only={name}', f'--steps={options.steps}']
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))
            print(name, rows[-1], flush=True)
    for figure in ('tokens_per_second', 'tokens_per_cpu_second', 'peak_gb'):
        a, b = (statistics.median(row[figure] for row in results[name]) for name in ('ours', 'theirs'))
        print(f'{figure:<24} ours {a:10.2f}   transformers {b:10.2f}   ratio {a / b:.2f}')


if __name__ == '__main__':
    main()
