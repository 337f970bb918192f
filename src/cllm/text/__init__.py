"""Files to documents to tokens to packed token files to batches."""
