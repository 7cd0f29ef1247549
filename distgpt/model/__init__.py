"""The network and how it learns. The room knows nothing of ranks.

Reading order: gpt (the network), optim (AdamW and learning rates), generate (text from a model), probe (find the first
layer whose values are not finite).

It may import only the modules beside the rooms: config, files, errors and their like.
"""
