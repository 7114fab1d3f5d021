# The default: a small model of Python code, trained on the standard library of this machine.
#
#     python train.py config/small.py
#
# Expected result: @@SMALL@@

data = "data/python"

block_size = 256
n_layer = 4
n_head = 4
n_embd = 128

steps = 1750
batch_tokens = 6 * 256
lr = 0.02
decay = 0.8
grad_clip = 0
eval_every = 875
save_every = 875
log_every = 25
sample_prompt = "def "
