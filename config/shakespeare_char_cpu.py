"""A small GPT on the characters of tiny Shakespeare, trained for a minute: the quick start on CPUs.

python train.py
python train.py config/shakespeare_char_cpu.py --dataset=mine --minutes=5

Hardware: any. On 2 CPU cores with bfloat16 instructions it reaches a loss of about 1.46.
"""

dataset = "shakespeare_char"
out_dir = "out/shakespeare_char_cpu"

n_layer, n_head, n_embd, block_size = 4, 2, 128, 256
activation, bias = "gelu", False
rotary, qk_norm, key_shift, conv = True, True, True, 3

batch_size = 16
minutes = 1
optimizer, muon_lr, learning_rate = "muon", 0.03, 12e-3  # with adamw alone use 4e-3
schedule, warmup_iters = "linear", 0

eval_interval = 0  # five times in the run
eval_tokens = 2**17  # all of tiny Shakespeare's; a larger text would take too much of a minute
log_interval = 0  # a hundred times
