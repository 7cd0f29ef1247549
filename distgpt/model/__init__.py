"""The network and its optimizer. This room knows nothing of ranks, but for muon, which needs whole matrices.

Reading order: gpt (the network), cpu_linear, cpu_attention and dropout (its slowest parts on a CPU), document_attention
(masks of documents on a GPU), optim (the optimizer and its learning rate), adamw (one whose shards change nothing),
muon, generate (sampling), probe (finds the first module whose values are not finite).

It may import only the modules beside the rooms, such as config, files and errors.
"""
