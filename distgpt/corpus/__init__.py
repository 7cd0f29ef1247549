"""From text to tokens to batches. The room knows nothing of ranks beyond two integers, rank and world size.

Reading order, while text is prepared: reading/ (files to documents), tokenizer/ (text to ids), preparing/ (documents to
a dataset, in parallel), shards (the dataset on disk), shard_writer (writes it). While a run trains: mixture (the
datasets of the run), order (the windows of each step), loader (the batches of a rank).

The files may import config, files, errors and the other modules beside the rooms, and no other room.
"""
