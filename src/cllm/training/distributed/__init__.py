"""Training by several processes of torchrun: replicas (DDP), shards (FSDP2), or stages of layers."""
