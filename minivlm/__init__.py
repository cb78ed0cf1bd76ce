"""minivlm: train, align, evaluate and serve small vision-language models on Ray."""
