"""What engines and schedulers share: the protocol, sampling, the blocks of the KV cache."""
