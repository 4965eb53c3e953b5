"""A small GPT on tiny Shakespeare in GPT-2's tokens.

python train.py config/shakespeare.py

Hardware: any. On 2 CPU cores 2.5 minutes, to a validation loss of 4.82 (2.25 bits per byte).
"""

dataset = "shakespeare"
out_dir = "out/shakespeare"

n_layer, n_head, n_embd, block_size = 4, 2, 128, 128
dropout = 0.1
activation, bias = "gelu", False
rotary, qk_norm, key_shift, conv = True, True, True, 3

batch_size = 16
max_iters = 300
optimizer, muon_lr, learning_rate = "muon", 0.03, 2e-3
schedule, warmup_iters = "linear", 0

eval_interval = 100
log_interval = 20
