"""Weights beyond one run: written for other programs, and read to start a run from.

Reading order: architectures (which models have the shape of GPT-2, Llama or Qwen3), names (what a parameter is called
there), writer (a checkpoint as files of safetensors), companions (what lies beside them); source (what init.from
names), files (safetensors, read a slice at a time), fit (whether they fit the run), initial (loads them into
its model).

It may import checkpoint, run, distributed, model, corpus and the modules beside the rooms.
"""
