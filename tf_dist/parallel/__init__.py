"""How the work is split and put together again. Takes a Comm, never makes one; knows no TensorFlow."""
