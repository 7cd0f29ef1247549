"""One model on many devices.

Reading order: runtime (this rank and its device), plan (how a run is laid out over its ranks), memory (what that takes
on a device), device (threads, precision, compiler), process_group (join the other ranks), mesh, parallelize (DDP, FSDP,
HSDP), gradients (their sum over micro-batches and ranks), exact (sums that no order changes), collectives (what ranks
exchange besides gradients), diloco.

It may import model and the modules beside the rooms.
"""
