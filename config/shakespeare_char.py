"""The baby GPT on the characters of tiny Shakespeare, with modern parts and Muon.

On CUDA this recipe is the quick start.

python train.py config/shakespeare_char.py

Hardware: any. On 2 CPU cores with AMX 12 minutes, to a validation loss of 1.37; on an H200 11 s.
"""

dataset = "shakespeare_char"
out_dir = "out/shakespeare_char"

n_layer, n_head, n_embd, block_size = 6, 6, 384, 256
activation, bias = "gelu", False
rotary, qk_norm, conv = True, True, 3

batch_size = 16
max_iters = 1200
optimizer, muon_lr, learning_rate = "muon", 0.03, 4e-3
weight_decay = 0.2  # strong, because a small text is read many times
schedule, warmup_iters = "linear", 0

eval_interval = 300
