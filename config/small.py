# The default: a small model of Python code, trained on the standard library of this machine.
#
#     python train.py config/small.py
#
# Expected result: 1.43 bits per byte of unseen files (xz -9e 1.69, gzip -9 1.95) after all
# steps; the figures of another Python's library differ. With --block_size=256 they took 93 s on
# two CPU cores with fast bfloat16; with this context they were not timed. A slower
# machine makes fewer steps, as many as fit into `minutes` by its speed until the rate begins to
# fall; if it becomes slower after that, they take longer.

data = "data/python"

block_size = 128  # of 1,536 tokens a step, twelve short windows teach more than six long ones
n_layer = 4
n_head = 4
n_embd = 128

steps = 1500
minutes = 3.5  # of the whole command; 0 makes all steps, however long they take
batch_tokens = 6 * 256
lr = 0.02
decay = 0.8
grad_clip = 0  # Muon and AdamW take steps of their own length, whatever the gradient's
eval_every = 750
save_every = 750
log_every = 25
sample_prompt = "def "
