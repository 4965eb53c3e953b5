"""A small GPT on the characters of tiny Shakespeare; `python train.py` alone takes it too.

python train.py config/shakespeare_char_cpu.py

Hardware: any CPU. On 2 cores about a minute, to a validation loss of 1.48.
"""

dataset = "shakespeare_char"
out_dir = "out/shakespeare_char_cpu"

n_layer, n_head, n_embd, block_size = 4, 2, 128, 256
activation, bias = "gelu", False
rotary, qk_norm, conv = True, True, 3

batch_size = 16
max_iters = 500
optimizer, muon_lr, learning_rate = "muon", 0.03, 12e-3  # adamw alone wants 4e-3
schedule, warmup_iters = "linear", 0

eval_interval = 250
log_interval = 50
