"""From documents to a dataset on disk, in parallel, with the same bytes for any number of workers and after a kill.

Reading order: build (the order of events), scan (reads all of the input once), vocabulary (the tokenizer for it),
encode (units of text to part files), parts (the format of these files), copies (documents that occur twice), merge
(parts to the two splits of a dataset), staging (the directory beside the output), workers (processes), report (the
progress and the summary).

The files may import reading/, tokenizer/, shards, shard_writer and the modules beside the rooms.
"""
