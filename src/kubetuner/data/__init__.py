"""Pictures and captions: geometry, decoding, shards and batches."""
