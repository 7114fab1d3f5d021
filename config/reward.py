# Reward: a model that solves half of the sums learns the others by trying (GRPO).
#
#     python prepare.py sums --tokenizer=bytes
#     python train.py config/sums.py --steps=240 --out=out/half
#     python train.py config/reward.py
#     python evaluate.py out/reward --split=test
#
# Expected result: from 62.6% of the sums of the test to 95.9% (another seed: from 73.3 to 97.1%),
# in four minutes of a core. An answer is checked, and never shown: see objectives/reward.py and
# docs/objectives.md.

data = "data/sums"
init_from = "out/half"
objective = "reward"

group = 8  # answers to each of 32 questions
inner = 1  # an answer of five tokens is written in less time than it is learned from
temperature = 0.7
max_tokens = 8

block_size = 32
n_layer = 3
n_head = 4
n_embd = 128

# gradients are mostly noise, and Muon makes all of them equally long: small steps
steps = 700
batch_tokens = 32 * 32
lr = 0.0015
embed_lr = 0.004
head_lr = 0.0002
warmup = 10
eval_every = 100
save_every = 100
log_every = 5
sample_tokens = 10
