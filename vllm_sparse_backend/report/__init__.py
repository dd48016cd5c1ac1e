"""What a profile does, made visible: `vllm-sparse inspect`, `estimate`, `report`."""
