"""GPT-2's shape with modern parts and Muon, on FineWeb.

python prepare.py fineweb10B_gpt2
python train.py config/train_gpt2_modern.py       on several GPUs: docs/scale.md

Hardware: a large GPU. Time and loss of the whole recipe are not yet measured.
"""

dataset = "fineweb10B_gpt2"
out_dir = "out/gpt2_modern"

block_size = 1024
vocab_size = 50304  # 50,257 padded to a multiple of 128, which GPUs multiply faster
activation, bias = "gelu", False
rotary, qk_norm, conv = True, True, 3

batch_size = 512
micro_batch_size = 16
max_iters = 19000
optimizer, muon_lr, learning_rate = "muon", 0.02, 2e-3
schedule = "linear"

eval_interval = 1000
snapshot_interval = 5000
