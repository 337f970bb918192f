"""What a training run will take, before it is begun: memory, time and communication by strategy."""
