"""Did the fine-tune help: evaluation loss on held-out samples, pictures before and after, CLIP scores, reports."""
