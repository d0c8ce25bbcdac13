"""Several processes train one model: started, taking turns, sharing weights, failing as one."""
