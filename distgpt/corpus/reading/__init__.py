"""From the files that a user names to documents of text.

Reading order: source (a file of input and the pieces it is cut into), finding (the files that --input names), formats
(the format of a file), streams (its bytes, decompressed and in UTF-8), text, json_text and parquet (the documents in
them), reader (opens any source), sizes (of the data read at a time).

The files may import errors alone.
"""
