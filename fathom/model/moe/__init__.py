"""DeepSeekMoE: the router, the experts, what carries tokens between them, and what keeps them in balance."""
