"""From text to tokens to batches. The room knows nothing of ranks beyond two integers, rank and world size.

Reading order, while text is prepared: sources (text and its documents), tokenizer, workers (processes that encode),
split (training or validation), pipeline (parts in parallel), staging (the output before its commit), shards (the
dataset on disk). While a run trains: order (which windows a step sees) and loader (the batches of a rank).

It may import only the modules beside the rooms: config, files, errors and their like.
"""
