"""A run on several processes: who handles which rows, and what each keeps."""
