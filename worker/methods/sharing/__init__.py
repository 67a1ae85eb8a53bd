"""How much a neuron or an attention head counts; the least important ones are left out first."""
