"""TwoTower in vLLM's model runner V2, beside asynchronous scheduling."""
