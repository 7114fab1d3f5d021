# Fine-tuning: weights that know a language already, on tiny Shakespeare.
#
#     python huggingface.py import gpt2 out/gpt2
#     python prepare.py shakespeare --tokenizer=gpt2 --val=0.1 --test=0 --out=data/shakespeare_gpt2
#     python train.py config/finetune_shakespeare.py --init_from=out/gpt2
#
# The shape is that of the checkpoint: only its context is cut, for speed, and dropout added, since
# a big model learns a megabyte of text by heart. The learning rate is a twentieth of config/gpt2's.
# It ends when three evaluations in a row were no better than the best; that one is kept.
# Source: config/finetune_shakespeare.py of github.com/karpathy/nanoGPT. Expected result: not
# measured here, where GPT-2's weights cannot be fetched.

data = "data/shakespeare_gpt2"
block_size = 256
dropout = 0.1

steps = 200
batch_tokens = 32 * 256
device_batch = 8
optimizer = "adamw"
lr = 3e-5
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.1
schedule = "cosine"
warmup = 0.1
decay = 1
final_lr = 0.1
eval_every = 20
patience = 3
save_every = 20
