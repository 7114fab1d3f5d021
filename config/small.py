# The default: a small model of Python code, trained on the standard library of this machine.
#
#     python train.py config/small.py
#
# Expected result: (to be measured)

steps = 300
sample_prompt = "def "
