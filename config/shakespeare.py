# Tiny Shakespeare, byte by byte.
#
#     python prepare.py shakespeare --tokenizer=bytes --val=0.1 --test=0
#     python train.py config/shakespeare.py
#
# Expected result: (to be measured)

data = "data/shakespeare"
block_size = 128
steps = 1000
batch_tokens = 8 * 128
