"""Where metrics go: a JSONL file, TensorBoard, the terminal. Works from plain data; knows nothing of torch."""
