"""What a training, drawing and serving will take, before it is paid for. May import training, engine and recipes."""
